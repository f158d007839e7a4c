"""What is written is a Hugging Face checkpoint: transformers loads it and computes the same."""

import dataclasses
import json

import pytest
import torch
from concertina.workers.training.export import write_checkpoint
from concertina.workers.training.loop import RunOptions, train
from concertina.workers.training.model import Decoder
from concertina.workers.training.tokens import EOS, VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("norm_topk", [False, True])
def test_transformers_loads_it_and_agrees(tmp_path, config, transformers, norm_topk):
    """T2: the trainer's forward pass is the checkpoint's."""
    shape = dataclasses.replace(config.model, norm_topk=norm_topk)
    model = Decoder(shape, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in model.parameters():  # no zeros, no ones: every tensor must arrive in its place
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.2)
    write_checkpoint(model, tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "OlmoeForCausalLM"
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, VOCAB, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours_TV, theirs_BLV = model(ids).logits_TV, theirs(ids).logits
    difference = (ours_TV - theirs_BLV.view_as(ours_TV)).abs().max()
    assert difference < 1e-4 * (ours_TV.max() - ours_TV.min())
    assert ours_TV.std() > 0.1


def test_a_trained_checkpoint_generates(tmp_path, corpus_dir, config, transformers):
    train(config, RunOptions(tmp_path / "out", corpus_dir, threads=1))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == EOS
    out = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= 9
    assert out[0, :4].tolist() == list(b"def ")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, transformers):
    from concertina.workers.training.files import write_json
    from concertina.workers.training.tokenizer import tokenizer_config, tokenizer_json

    folder = tmp_path_factory.mktemp("tokenizer")
    write_json(folder / "tokenizer.json", tokenizer_json())
    write_json(folder / "tokenizer_config.json", tokenizer_config(64))
    return transformers.AutoTokenizer.from_pretrained(folder)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(deadline=None, max_examples=60)
def test_tokens_are_the_bytes_and_come_back(tokenizer, text):
    """T3: ids are UTF-8 bytes; decoding gives the text back."""
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_all_bytes_are_distinct_tokens_and_specials_follow(tokenizer):
    assert len(tokenizer) == VOCAB
    assert len({tokenizer.convert_ids_to_tokens(b) for b in range(256)}) == 256
    assert tokenizer("a<|endoftext|>b").input_ids == [97, EOS, 98]
    assert tokenizer.eos_token_id == EOS


def test_chat_template_is_the_text(tokenizer):
    messages = [{"role": "system", "content": "# code"}, {"role": "user", "content": "def f():"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "# code\ndef f():\n"


def test_config_names_the_architecture(tmp_path, config):
    write_checkpoint(Decoder(config.model, torch.Generator()), tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["architectures"] == ["OlmoeForCausalLM"]
    assert (data["num_key_value_heads"], data["max_position_embeddings"], data["vocab_size"]) == (1, 64, 258)
    assert not list(tmp_path.glob(".*.tmp"))
