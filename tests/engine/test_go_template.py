from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.errors import ModelfileInvalid
from octavo_engine.text.go_template import GoTemplate

# In the shapes that Ollama's models have: by rounds, with .System and .Prompt, and over .Messages.
ROUNDS = (
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
    "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
)
MESSAGES = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>

{{ .Content }}<|eot_id|>{{ if $last }}<|start_header_id|>assistant<|end_header_id|>

{{ end }}
{{- else if eq .Role "assistant" }}<|start_header_id|>assistant<|end_header_id|>

{{ .Content }}{{ if not $last }}<|eot_id|>{{ end }}
{{- else if or (eq .Role "system") (eq .Role "tool") }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}
{{- end }}"""


def conversation(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def render(source: str, *messages: tuple[str, str]) -> str:
    return GoTemplate(source).render(conversation(*messages))


def test_a_template_of_rounds_is_written_once_a_round_and_ends_where_the_answer_begins() -> None:
    told = render(ROUNDS, ("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"))
    assert told == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_of_rounds_without_a_response_has_the_answers_at_its_end() -> None:
    assert render("[{{ .Prompt }}]", ("user", "U1"), ("assistant", "A1"), ("user", "U2")) == "[U1]A1[U2]"


def test_a_template_over_messages_sees_all_of_them() -> None:
    told = render(MESSAGES, ("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    parts = (("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"))
    whole = "".join(head.format(role, f"{content}<|eot_id|>") for role, content in parts)
    assert told == whole + head.format("assistant", "")


def test_neighbours_of_one_role_are_joined() -> None:
    assert render("{{ range .Messages }}[{{ .Content }}]{{ end }}", ("user", "a"), ("user", "b")) == "[a\n\nb]"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a {{- 1 -}} b", "a1b"),
        ("a{{/* not this */}}b {{- /* nor this */ -}} c", "abc"),
        ('{{ "x\\n\\"y" }}{{ `raw\\n` }}', 'x\n"yraw\\n'),
        ("{{ $x := 1 }}{{ if true }}{{ $x = 2 }}{{ $y := 3 }}{{ $y }}{{ end }}{{ $x }}", "32"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }} {{ else }}none{{ end }}", "0user 1assistant 2user "),
        ("{{ range .Messages }}{{ if eq .Role `assistant` }}{{ continue }}{{ end }}{{ .Content }}{{ end }}", "ac"),
        ("{{ range .Messages }}{{ if eq .Role `assistant` }}{{ break }}{{ end }}{{ .Content }}{{ end }}", "a"),
        ("{{ range .Tools }}x{{ else }}none{{ end }}{{ .Messages | len }}", "none3"),
        ("{{ with .System }}{{ . }}{{ else }}none{{ end }}{{ len .Messages }}", "none3"),
        ("{{ (index .Messages 1).Content }}{{ len (slice .Messages 1 3) }}{{ $.System }}", "b2"),
        ("{{ and .Messages .System `x` }}|{{ or .System `y` }}|{{ not .System }}{{ len .Messages }}", "|y|true3"),
        ("{{ if and (ne 1 2) (lt 1 2) (le 2 2) (gt 3 2) (ge 3 3) }}yes{{ end }}{{ len .Messages }}", "yes3"),
        ("{{ eq 1 2 1 }}{{ eq true 1 }}{{ len .Messages }}{{ len `é` }}", "truefalse32"),
        ("{{ json (index .Messages 0).Content }}{{ json `<b>&` }}", '"a""\\u003cb\\u003e\\u0026"'),
        ("{{ if .System }}1{{ else if .Messages }}2{{ else }}3{{ end }}", "2"),
    ],
)
def test_the_language_means_what_go_means(source: str, text: str) -> None:
    over_messages = source + "{{ if nil }}{{ .Messages }}{{ end }}"
    assert render(over_messages, ("user", "a"), ("assistant", "b"), ("user", "c")) == text


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("a\n{{ .Sytem }}", "line 2: the field .Sytem is not one"),
        ("\n\n{{ printf `%d` 1 }}", "line 3: the function printf is not supported"),
        ('{{ define "x" }}{{ end }}', "line 1: define is not supported"),
        ("{{ if .System }}", r"line 1: \{\{ end \}\} is missing"),
        ("{{ end }}", "line 1: end has no beginning"),
        ("{{ .System", r"line 1: \{\{ has no \}\}"),
        ("{{ $x }}", r"line 1: the variable \$x is not declared"),
        ("{{ range .Messages }}{{ $x := 1 }}{{ end }}{{ $x }}", r"line 1: the variable \$x is not declared"),
        ("{{ $x = 1 }}", r"line 1: the variable \$x is not declared"),
        ("{{ }}", "line 1: something is missing"),
        ("{{ .System .Prompt }}", "line 1: '.Prompt' is one operand too many"),
        ("{{ eq 1 }}", "line 1: eq has 1 arguments"),
        ("{{ (1 }}", r"line 1: \) is missing"),
        ("{{ 'a' }}", "line 1: .* is not supported"),
        ("{{ break }}", "line 1: break is in no range"),
        ("{{" + "(" * 60 + "1" + ")" * 60 + "}}", "line 1: parentheses are too deep"),
        ("{{ if 1 }}" * 60, "line 1: blocks are too deep"),
    ],
)
def test_what_is_not_supported_is_refused_with_line_and_token(source: str, problem: str) -> None:
    with pytest.raises(ModelfileInvalid, match=problem):
        GoTemplate(source)


def test_messages_that_a_template_does_not_go_with_are_told() -> None:
    with pytest.raises(ModelfileInvalid, match="does not go with these messages: there is no item 7 among 1"):
        render("{{ (index .Messages 7).Content }}", ("user", "a"))


PIECES = [
    "{{",
    "}}",
    "{{-",
    " -}}",
    "if ",
    "else ",
    "end",
    "range ",
    "with ",
    ".Messages",
    ".System",
    "$x",
    " := ",
    "=",
]
PIECES += ["|", "(", ")", "len ", "index ", "eq ", "1", "`a`", '"', "\n", ",", " ", "text", "/*", "*/", "$", "."]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_source_is_parsed_or_refused_with_its_line(source: str) -> None:
    try:
        template = GoTemplate(source)
    except ModelfileInvalid as error:
        assert str(error).startswith("line ")  # noqa: PT017 - most sources are refused, and some are not
        return
    try:
        assert isinstance(template.render(conversation(("user", "a"))), str)
    except ModelfileInvalid as error:
        assert "does not go with these messages" in str(error)  # noqa: PT017 - the same
