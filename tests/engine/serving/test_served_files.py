"""The same tiny model over HTTP from a GGUF file and from a folder of safetensors shards: what transformers says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engine.conftest import Serve, WriteGGUF

pytestmark = pytest.mark.timeout(400)

CONTROL = ["<unk>", "<s>", "</s>"]
ROLES = {"eos_token": "</s>"}
VOCABULARY = [*CONTROL, "ĠĠ", "Ġ", *map(chr, range(0x21, 0x7C))]  # as many as the tiny model has
MERGE = ("Ġ", "Ġ")
TEMPLATE = "{% for message in messages %}{{ message.content }}!{% endfor %}"
QUESTION = "Hello there, model"
NUM_TOKENS = 24


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Any) -> Path:
    """The model as transformers saves it, in several shards, with its tokenizer."""
    bpe = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[MERGE]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(CONTROL)
    path = tmp_path / "tiny-folder"
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=bpe, **ROLES, chat_template=TEMPLATE).save_pretrained(path)
    tiny_llama.save_pretrained(path, max_shard_size="50KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def file(write_tiny_gguf: WriteGGUF) -> Path:
    """The model as one GGUF file, with its tokenizer."""
    return write_tiny_gguf(
        metadata={
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": VOCABULARY,
            "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(VOCABULARY) - len(CONTROL)),
            "tokenizer.ggml.merges": [" ".join(MERGE)],
            "tokenizer.chat_template": TEMPLATE,
        }
    )


@pytest.mark.parametrize("source", ["folder", "file"])
def test_a_served_model_answers_with_the_tokens_of_transformers(
    serve: Serve, tiny_llama: Any, tmp_path: Path, request: pytest.FixtureRequest, source: str
) -> None:
    prompt = [VOCABULARY.index("Ġ" if character == " " else character) for character in f"{QUESTION}!"]
    generated = tiny_llama.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    said = "".join(VOCABULARY[i] for i in generated if i >= len(CONTROL)).replace("Ġ", " ")
    path: Path = request.getfixturevalue(source)
    options = ("--dtype", "float32", "--served-model-name", "tiny", "--kv-cache-memory-bytes", "4194304")
    with serve(path, tmp_path / "log", *options) as served, served.sync_client() as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=NUM_TOKENS,
            extra_body={"ignore_eos": True},
        )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), NUM_TOKENS)
    assert answer.choices[0].message.content == said
