from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.errors import ModelfileInvalid
from octavo_engine.modelfile import Modelfile, parse_modelfile
from octavo_engine.parameters import NAMES, check, from_text
from octavo_engine.text.go_nodes import FUNCTIONS

PAGE: Final = (Path(__file__).parents[2] / "docs" / "modelfile.md").read_text(encoding="utf-8")
WHOLE = '''\
# a comment
from llama3.2:1b
REQUIRES 0.6.0
ADAPTER ./lora

PARAMETER temperature 0.5
parameter stop "<|im_end|>"
PARAMETER stop """a "b"
c"""
PARAMETER mirostat 0
TEMPLATE """{{ if .System }}{{ .System }}
{{ end }}{{ .Prompt }}"""
SYSTEM You are "Mario" # and this is no comment
MESSAGE user Is 3 a number?
MESSAGE assistant "yes"
LICENSE """
Do what you want.
"""
'''


def test_every_instruction_is_read() -> None:
    assert parse_modelfile(WHOLE) == Modelfile(
        source="llama3.2:1b",
        adapter="./lora",
        requires="0.6.0",
        parameters={"temperature": 0.5, "stop": ("<|im_end|>", 'a "b"\nc')},
        template="{{ if .System }}{{ .System }}\n{{ end }}{{ .Prompt }}",
        system='You are "Mario" # and this is no comment',
        messages=(("user", "Is 3 a number?"), ("assistant", "yes")),
        licenses=("\nDo what you want.\n",),
    )


def test_lines_may_end_as_windows_ends_them() -> None:
    assert parse_modelfile("FROM a\r\n\r\nSYSTEM hi\r\n") == Modelfile(source="a", system="hi")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no FROM"),
        ("FROM a\nFROM b", "line 2: a second FROM"),
        ("\nFROM", "line 2: 'FROM' is not an instruction with a value"),
        ('FROM ""', "line 1: FROM names no model"),
        ('FROM a\n\nADAPTER ""', "line 3: ADAPTER names no adapter"),
        ("FROM a\nADAPTER x\nADAPTER y", "line 3: a second ADAPTER"),
        ("FROM a\nRENDERER qwen3", "line 2: RENDERER is not supported"),
        ("FROM a\nTEMPERATURE 1", "line 2: TEMPERATURE is not an instruction; there are FROM"),
        ("FROM a\nPARAMETER temperature hot", "line 2: PARAMETER temperature is 'hot', not a number"),
        ("FROM a\n# x\nPARAMETER num_thread 8", "line 3: PARAMETER num_thread 8 is not supported: "),
        ("FROM a\nPARAMETER colour red", "line 2: PARAMETER there is no parameter 'colour'"),
        ("FROM a\nPARAMETER temperature", "line 2: a parameter's name and a value are missing"),
        ("FROM a\nMESSAGE robot hi", "line 2: MESSAGE: 'robot' is not a role"),
        ('FROM a\nSYSTEM """x\ny', "line 2: a text that begins with a quote does not end"),
        ("FROM a\nTEMPLATE {{ .Promt }}", "line 2: TEMPLATE line 1: the field .Promt is not one"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(ModelfileInvalid, match=problem):
        parse_modelfile(text)


texts = st.text(st.sampled_from('ab "#\n\r\t:{é') | st.characters(codec="utf-8"), max_size=20)
filled = texts.filter(bool)
modelfiles = st.builds(
    Modelfile,
    source=filled,
    adapter=texts,
    parameters=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 2),
            "top_k": st.integers(-1, 100),
            "num_ctx": st.integers(2, 10**6),
            "stop": st.lists(filled, min_size=1, max_size=3).map(tuple),
        },
    ),
    template=st.sampled_from(["", "{{ .Prompt }}", '{{ if eq .Prompt "a" }}\n"""x{{ end }}"']),
    system=texts,
    messages=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), max_size=3).map(tuple),
    licenses=st.lists(texts, max_size=2).map(tuple),
    requires=texts,
)


@settings(deadline=None)
@given(modelfiles)
def test_what_is_written_is_read_as_the_same(modelfile: Modelfile) -> None:
    try:
        text = modelfile.render()
    except ModelfileInvalid as error:
        assert "cannot be written" in str(error)  # noqa: PT017 - few texts, and hypothesis finds them
        return
    assert parse_modelfile(text) == modelfile


def test_what_a_modelfile_does_not_say_stays_as_its_base_has_it() -> None:
    base = Modelfile(source="w.gguf", adapter="x", system="old", parameters={"top_k": 1, "seed": 2}, licenses=("L",))
    over = Modelfile(source="base", system="new", parameters={"top_k": 3})
    assert over.over(base) == Modelfile(
        source="w.gguf", adapter="x", system="new", parameters={"top_k": 3, "seed": 2}, licenses=("L",)
    )


def test_a_second_adapter_on_top_of_the_bases_is_refused() -> None:
    with pytest.raises(ModelfileInvalid, match=r"ADAPTER y: the model that FROM names has one already \(x\)"):
        Modelfile(source="a", adapter="y").over(Modelfile(source="w", adapter="x"))


def rows(title: str) -> dict[str, str]:
    """The table below a heading of docs/modelfile.md."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|$", section, re.MULTILINE))


def test_the_page_has_every_instruction_and_an_example_that_works() -> None:
    example = PAGE.split("```\n")[1]
    modelfile = parse_modelfile(example)
    assert modelfile.messages == (("user", "Where is Rome?"), ("assistant", "In Italy."))
    assert parse_modelfile(modelfile.render()) == modelfile
    with pytest.raises(ModelfileInvalid) as refusal:
        parse_modelfile("NONE x")
    known = str(refusal.value).rpartition("there are ")[2].split(", ")
    assert {name for name in known if f"`{name}`" not in PAGE} == set()
    assert set(rows("Instructions")) < set(known)


def test_the_page_has_every_parameter_and_the_values_that_ask_for_nothing() -> None:
    working, lacking = rows("Parameters that work"), rows("Parameters that the engine lacks")
    assert working.keys() | lacking.keys() == NAMES
    assert not working.keys() & lacking.keys()
    for name, accepted in lacking.items():
        if value := accepted.partition(";")[0]:
            assert check(name, from_text(name, value)) == {}


def test_the_page_has_every_function_of_templates() -> None:
    section = PAGE.split("\n## Templates\n")[1]
    assert {name for name in FUNCTIONS if f"`{name}`" not in section} == set()
