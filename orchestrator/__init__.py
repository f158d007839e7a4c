"""What people and clusters talk to: command line, controller, ingress, configuration.

``import ray`` appears only in the modules that ``.importlinter`` names; decisions live in pure code.
"""
