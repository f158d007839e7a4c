"""The FastAPI application: routes, and the shape of every error."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from .account import Queue
from .answer import Endpoint
from .api_errors import ApiError, server_error
from .chat import Chat
from .completions import Completions
from .intake import ApiKeys
from .metrics import Metrics
from .router import Router
from .service import Service
from .settings import IngressSettings
from .tokenizer import Tokenizer


def create_app(settings: IngressSettings, router: Router) -> FastAPI:
    """An OpenAI-compatible application.

    Parameters
    ----------
    settings : IngressSettings
    router : Router
        Closed when the application shuts down; its members are up to whoever made it.

    Raises
    ------
    OperatorError
        The checkpoint has no readable tokenizer.
    """
    metrics = Metrics(lambda: router.lanes)
    service = Service(settings, Tokenizer.load(settings.checkpoint), router, metrics, Queue(metrics))
    app = FastAPI(title="Concertina", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan(router))
    app.state.service = service
    _add_errors(app, metrics)
    _add_open_routes(app, service)
    _add_api(app, service)
    return app


def _lifespan(router: Router) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await router.close()

    return lifespan


def _add_open_routes(app: FastAPI, service: Service) -> None:
    """What needs no key: the questions of probes and Prometheus."""

    @app.get("/health")
    async def health() -> Response:
        lanes = service.router.lanes
        state: dict[str, Any] = {"status": "ok" if service.router.ready else "no worker", "workers": len(lanes)}
        state["connected"] = sum(lane.connected for lane in lanes)
        state["awaited"] = len(service.router.awaited)
        return JSONResponse(state, 200 if service.router.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_api(app: FastAPI, service: Service) -> None:
    keys = ApiKeys(service.settings.api_keys)

    async def authorized(request: Request) -> None:
        keys.check(request.headers.get("authorization"))

    needs_key = [Depends(authorized)]
    created = int(time.time())
    for endpoint in (Completions(), Chat()):
        route = _route(service, endpoint)
        app.add_api_route(endpoint.path, route, methods=["POST"], dependencies=needs_key, response_model=None)

    @app.get("/v1/models", dependencies=needs_key)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name, created) for name in service.settings.model_names]}

    @app.get("/v1/models/{name:path}", dependencies=needs_key)
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service, name, created)


def _route(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await service.answer(endpoint, request)

    return answer


def _model(service: Service, name: str, created: int) -> dict[str, Any]:
    limit = service.settings.max_model_len
    return {"id": name, "object": "model", "created": created, "owned_by": "concertina", "max_model_len": limit}


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error in OpenAI's shape, also those of the framework and our own faults."""

    def respond(request: Request, error: ApiError) -> Response:
        known = getattr(request.scope.get("route"), "path", "other")
        metrics.requests.labels(known, str(error.status)).inc()
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return respond(request, error)

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        return respond(request, ApiError(error.status_code, f"{error.detail}: {where}", code="not_found"))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return respond(request, server_error(500, "Internal error; the server's log has the details", "internal_error"))
