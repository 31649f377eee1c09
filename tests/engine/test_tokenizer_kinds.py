"""Every kind of tokenizer against an implementation that is not ours, on vocabularies trained here."""

from __future__ import annotations

import io
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import regex  # type: ignore[import-untyped] # it comes with transformers and without types
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from octavo_engine.errors import ModelInvalid, ModelNotFound, ModelUnsupported
from octavo_engine.text.detokenizer import Detokenizer
from octavo_engine.text.gguf_tokenizer import tokenizer_from_gguf
from octavo_engine.text.load import load_tokenizer
from octavo_engine.text.tokenizer import ControlToken, Segment, Tokenizer
from octavo_engine.weights.gguf import GGUFHeader

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

CORPUS = [
    "Hello, world! It's a test; we'LL see what they've done. HTTPServer McDonald's iPhone",
    "  leading and trailing   spaces  \t\n\r\n\n  mixed\u00a0whitespace\u2003here\u200b ",
    "def f(x):\n\treturn {'a': [1, 22, 333], \"b\": x ** 2}  # comment\n",
    "naïve façade, Ünïcödé, Zürich, Łódź, İstanbul, ﬁne ligature, e\u0301 decomposed",
    "日本語のテキスト、中文文本\uff0c한국어 텍스트",
    "Привет, мир! Ελληνικά. עברית. العربية. हिन्दी ไทย",
    "😀👍🏽👨‍👩‍👧‍👦🏳️‍🌈 \U0001d518",
    "3.14159 1,000,000 0x1F 2026-11-22T22:19:00Z ٣٤ ½ ² Ⅷ 12345678",
    "\x00\x01\x1f\x7f\x80\ufeff\ufffd\U000e0001\U0010ffff",
    "http://example.com/path?query=1&x=%20#frag <b>html</b> &amp;/\n/",
    "▁ <s> </s> <0x41> <|end|> <unk> [INST]",
    "a" * 300,
    "",
]
TRAINING = [*CORPUS, (Path(__file__).parent / "data/passage.txt").read_text()] * 2
CONTROL = ["<s>", "</s>", "<|end|>"]
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|end|>"}
MASK = {"mask_token": "</s>"}
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(
        [*CONTROL, *" \n\t'▁aeE1٣é", "the ", "'s", "'RE", "  ", "<0x41>", "<unk>", "\U0001f600", "e\u0301", "日本"]
    )
).map("".join)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As the models' own tokenizer.json files and llama-vocab.cpp have them, for another engine of regular expressions.
CUTS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "tekken": [TEKKEN],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}


def header(**entries: Any) -> GGUFHeader:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    return GGUFHeader(path=Path("tiny.gguf"), metadata=metadata, tensors={})


@cache
def byte_level() -> dict[str, Any]:
    """The vocabulary and merges of a byte-level BPE trained on the corpus."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TRAINING, trainer)
    model: dict[str, Any] = json.loads(bpe.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


@cache
def from_byte_level(pre: str) -> Tokenizer:
    """As llama.cpp's converter writes it: the trained vocabulary, then the control tokens."""
    parts = byte_level()
    tokens = [*parts["vocab"], *CONTROL]
    return tokenizer_from_gguf(
        header(
            model="gpt2",
            pre=pre,
            tokens=tokens,
            token_type=[1] * len(parts["vocab"]) + [3] * len(CONTROL),
            merges=[" ".join(merge) for merge in parts["merges"]],
            bos_token_id=tokens.index("<s>"),
            eos_token_id=tokens.index("</s>"),
        )
    )


def cut(text: str, patterns: list[str]) -> list[str]:
    """The pieces of a text, by the package regex."""
    pieces = [text]
    for pattern in patterns:
        finer: list[str] = []
        for piece in pieces:
            position = 0
            for match in regex.finditer(pattern, piece):
                finer += [piece[position : match.start()], match.group()]
                position = match.end()
            finer.append(piece[position:])
        pieces = [piece for piece in finer if piece]
    return pieces


def merged(piece: str, *, whole_words: bool) -> list[int]:
    """The tokens of a piece, by the definition of byte-pair merging."""
    parts = byte_level()
    ((written, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(piece)
    if whole_words and written in parts["vocab"]:
        return [parts["vocab"][written]]
    ranks = {merge: rank for rank, merge in enumerate(parts["merges"])}
    symbols = list(written)
    while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        joined, index = [], 0
        while index < len(symbols):
            both = tuple(symbols[index : index + 2]) == best
            joined.append("".join(symbols[index : index + 2]) if both else symbols[index])
            index += 2 if both else 1
        symbols = joined
    return [parts["vocab"][symbol] for symbol in symbols]


@pytest.mark.parametrize("pre", CUTS)
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_byte_level_vocabularies_are_cut_and_merged_by_their_definition(pre: str, text: str) -> None:
    for sample in (text, *(CORPUS if text == "" else ())):
        whole_words = pre in ("llama-bpe", "tekken")
        expected = [token for piece in cut(sample, CUTS[pre]) for token in merged(piece, whole_words=whole_words)]
        tokenizer = from_byte_level(pre)
        assert tokenizer.encode([Segment(sample, control_tokens=False)]) == expected
        assert b"".join(tokenizer.token_bytes[token] for token in expected) == sample.encode()


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
@example(text="".join(CORPUS))
def test_qwens_vocabulary_is_that_of_transformers(text: str) -> None:
    parts = byte_level()
    size = len(parts["vocab"])
    make: Any = Qwen2Tokenizer
    theirs = make(
        vocab=parts["vocab"] | {token: size + index for index, token in enumerate(CONTROL)},
        merges=parts["merges"],
        unk_token=None,
        **ROLES,
    )
    for control in (False, True):
        theirs_ids = theirs(text, add_special_tokens=False, split_special_tokens=not control)["input_ids"]
        assert from_byte_level("qwen2").encode([Segment(text, control)]) == theirs_ids


@cache
def pieces(*, add_space: bool) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE trained on the corpus, in the manner of Llama 2 (add_space) or Gemma."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            line for text in TRAINING for line in text.splitlines() if line.strip() and "\0" not in line
        ),
        model_writer=written,
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=add_space,
        split_digits=True,
        user_defined_symbols=[] if add_space else ["\n\n", "<b>"],
        control_symbols=["<|end|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@cache
def from_pieces(*, add_space: bool) -> Tokenizer:
    """The same as llama.cpp's converter writes it."""
    sp = pieces(add_space=add_space)
    size = sp.get_piece_size()
    kinds: list[tuple[Callable[[int], bool], int]] = [
        (sp.is_unknown, 2),
        (sp.is_control, 3),
        (sp.is_unused, 5),
        (sp.is_byte, 6),
    ]
    user_defined = {"\n\n", "<b>"} if not add_space else set()
    types = [
        4 if sp.id_to_piece(i) in user_defined else next((number for is_kind, number in kinds if is_kind(i)), 1)
        for i in range(size)
    ]
    return tokenizer_from_gguf(
        header(
            model="llama",
            pre="default",
            tokens=[sp.id_to_piece(i) for i in range(size)],
            scores=[sp.get_score(i) for i in range(size)],
            token_type=types,
            bos_token_id=1,
            eos_token_id=2,
            add_space_prefix=add_space,
        )
    )


@pytest.mark.parametrize("add_space", [True, False], ids=["as Llama 2", "as Gemma"])
@settings(max_examples=300, deadline=None)
@given(text=TEXT)
@example(text="".join(CORPUS))
@example(text="a <b> b\n\n\nc<b>")
def test_sentencepiece_vocabularies_give_what_sentencepiece_gives(*, add_space: bool, text: str) -> None:
    text = text.replace("\0", "")  # where sentencepiece ends a text
    sp, tokenizer = pieces(add_space=add_space), from_pieces(add_space=add_space)
    ids = tokenizer.encode([Segment(text, control_tokens=False)])
    assert ids == sp.encode(text)
    decoded = b"".join(tokenizer.token_bytes[token_id] for token_id in ids).decode()
    # A space that was there and U+2581 are one to SentencePiece.
    assert decoded == (" " if add_space and text else "") + text.replace("▁", " ")


def test_a_prompt_of_a_sentencepiece_model_begins_with_bos_and_text_after_a_control_token_with_a_space() -> None:
    tokenizer = from_pieces(add_space=True)
    assert tokenizer.prompt_prefix_ids == (1,)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    word = pieces(add_space=True).encode("the")
    assert tokenizer.encode([Segment("the</s>the", control_tokens=True)]) == [*word, 2, *word]


# Folders as transformers writes them.


def sentencepiece_json(scheme: str) -> tokenizers.Tokenizer:
    """The SentencePiece vocabulary in tokenizer.json's format; a scheme of Metaspace, or the legacy normaliser."""
    ours = json.loads(from_pieces(add_space=scheme != "gemma")._backend.to_str())["model"]
    vocab = {"<s>": 1, "</s>": 2, "<|end|>": 3} | ours["vocab"]
    merges = [tuple(merge) for merge in ours["merges"]]
    gemma: Any = GemmaTokenizer
    llama: Any = LlamaTokenizer
    if scheme == "gemma":
        made: tokenizers.Tokenizer = gemma(vocab=vocab, merges=merges, **(ROLES | MASK))._tokenizer
        return made
    made = llama(vocab=vocab, merges=merges, legacy=scheme == "always")._tokenizer
    if scheme == "legacy":
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens(["<|end|>"])
    return made


def byte_level_json() -> tokenizers.Tokenizer:
    parts = byte_level()
    made = tokenizers.Tokenizer(models.BPE(vocab=parts["vocab"], merges=parts["merges"], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(CUTS["llama-bpe"][0]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(CONTROL[:2])
    made.add_special_tokens([tokenizers.AddedToken("<|end|>", lstrip=True, rstrip=True)])
    made.add_tokens(["<think>"])
    bos = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return made


FOLDERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": byte_level_json,
    "metaspace first": lambda: sentencepiece_json("first"),
    "metaspace always": lambda: sentencepiece_json("always"),
    "legacy": lambda: sentencepiece_json("legacy"),
    "gemma": lambda: sentencepiece_json("gemma"),
}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    """Our tokenizer of a folder, and transformers'."""
    path = tmp_path_factory.mktemp("folder")
    make: Any = PreTrainedTokenizerFast
    made = make(tokenizer_object=FOLDERS[request.param](), **ROLES, chat_template="{{ bos_token }}x")
    made.save_pretrained(path)
    theirs: PreTrainedTokenizerBase = make.from_pretrained(path)
    return load_tokenizer(path), theirs


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
@example(text="".join(CORPUS))
@example(text="a <|end|>  b<s> the <|end|> <think> x")
def test_a_folder_gives_what_transformers_gives(folder: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = folder
    ids = [*ours.prompt_prefix_ids, *ours.encode([Segment(text, control_tokens=True)]), *ours.prompt_suffix_ids]
    assert ids == theirs(text)["input_ids"]
    plain = ours.encode([Segment(text, control_tokens=False)])
    assert ours.control_ids.isdisjoint(plain)
    assert plain == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    decoded = b"".join(ours.token_bytes[token_id] for token_id in plain).decode(errors="replace")
    expected = theirs.decode(plain, clean_up_tokenization_spaces=False)
    assert decoded in (expected, " " + expected)  # without the space that SentencePiece puts before a text


def test_a_folders_special_tokens_and_template_are_read(folder: tuple[Tokenizer, Any]) -> None:
    ours, theirs = folder
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    assert {theirs.bos_token_id, theirs.eos_token_id} <= ours.control_ids
    assert ours.chat_template == "{{ bos_token }}x"


# What the configuration says, what is refused.


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a tokenizer.json alone."""
    byte_level_json().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def configure(folder: Path, **config: Any) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def test_the_beginning_and_end_of_prompts_are_the_configurations_before_the_post_processors(small: Path) -> None:
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    bos, eos = (byte_level_json().token_to_id(token) for token in CONTROL[:2])
    assert configure(small, **names).prompt_prefix_ids == (bos,)
    assert configure(small, **names).prompt_suffix_ids == ()
    assert configure(small, **names, add_bos_token=False).prompt_prefix_ids == ()
    assert configure(small, **names, add_eos_token=True).prompt_suffix_ids == (eos,)
    assert configure(small).prompt_prefix_ids == ()
    (small / "special_tokens_map.json").write_text(json.dumps(names))
    assert configure(small).prompt_prefix_ids == (bos,)


def test_the_chat_template_is_a_string_or_the_default_of_a_list_or_a_file(small: Path) -> None:
    assert load_tokenizer(small).chat_template is None
    assert configure(small, chat_template="one").chat_template == "one"
    several = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert configure(small, chat_template=several).chat_template == "three"
    (small / "chat_template.jinja").write_text("four")
    assert configure(small, chat_template="one").chat_template == "four"


def test_a_folder_without_a_readable_tokenizer_is_refused(small: Path) -> None:
    path = small / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}))
    with pytest.raises(ModelUnsupported, match="has the decoder WordPiece"):
        load_tokenizer(small)
    for broken in ("{", "[]", "{}", "[" * 100_000):
        path.write_text(broken)
        with pytest.raises(ModelInvalid, match=r"tokenizer\.json"):
            load_tokenizer(small)
    path.unlink()
    with pytest.raises(ModelNotFound, match=r"has no tokenizer\.json"):
        load_tokenizer(small)


def test_merges_that_would_make_a_control_token_of_text_do_not_count(small: Path) -> None:
    path = small / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= {"vocab": {"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4}, "ignore_merges": False}
    content["model"]["merges"] = [["<", "s"], ["<s", ">"]]
    content |= {"added_tokens": [content["added_tokens"][0] | {"id": 4}], "post_processor": None}
    content["pre_tokenizer"] = None
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(small)
    assert tokenizer.encode([Segment("<s>", control_tokens=False)]) == [3, 2]
    assert tokenizer.encode([Segment("<s>", control_tokens=True)]) == [4]


# Search for control tokens, and streaming.


@given(
    words=st.lists(st.text("ab|.", min_size=1, max_size=4), min_size=1, max_size=8, unique=True), text=st.text("ab|.")
)
def test_the_longest_control_token_at_a_place_counts(words: list[str], text: str) -> None:
    tokenizer = Tokenizer(
        from_byte_level("gpt-2")._backend,
        token_bytes=(b"",),
        control_tokens={word: ControlToken(index) for index, word in enumerate(words)},
        bos_id=None,
        eos_id=None,
        adds_bos=False,
        adds_eos=False,
        chat_template=None,
    )
    longest_first = sorted(words, key=len, reverse=True)
    expected = regex.findall("|".join(map(regex.escape, longest_first)), text)
    assert tokenizer.control_pattern is not None
    assert [match.group() for match in tokenizer.control_pattern.finditer(text)] == expected


def test_a_control_token_of_absurd_length_is_refused() -> None:
    with pytest.raises(ModelInvalid, match="control token has 20000 characters"):
        tokenizer_from_gguf(header(model="gpt2", pre="gpt-2", tokens=["a" * 20_000, "b"], token_type=[3, 1], merges=[]))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: from_byte_level("llama-bpe"),
    "as Llama 2": lambda: from_pieces(add_space=True),
    "as Gemma": lambda: from_pieces(add_space=False),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 1100)), size=st.integers(1, 5))
def test_streamed_text_is_the_text_of_all_tokens_at_once_and_never_half_a_character(
    kind: str, ids: list[int], size: int
) -> None:
    tokenizer = KINDS[kind]()
    detokenizer = Detokenizer(tokenizer.token_bytes, tokenizer.control_ids)
    pieces_out = [detokenizer.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    shown = [i for i in ids if i < tokenizer.vocab_size and i not in tokenizer.control_ids]
    at_once = b"".join(tokenizer.token_bytes[token_id] for token_id in shown).decode(errors="replace")
    assert "".join(pieces_out) + detokenizer.finish() == at_once


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=TEXT.filter(lambda text: "\ufffd" not in text and "\0" not in text), size=st.integers(1, 3))
def test_a_text_streams_as_itself(kind: str, text: str, size: int) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode([Segment(text, control_tokens=False)])
    detokenizer = Detokenizer(tokenizer.token_bytes, tokenizer.control_ids)
    pieces_out = [detokenizer.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert not any("\ufffd" in piece for piece in pieces_out)
    if kind != "byte level":
        text = (" " if kind == "as Llama 2" and text else "") + text.replace("▁", " ")
    assert "".join(pieces_out) + detokenizer.finish() == text
