"""From the source of a Go template to functions (go_nodes.py): the part of the language that Ollama's models use.

Called by go_template.py. What is not here is refused with line and token: `define`, `block`, `template`, other
functions, and fields that Ollama does not give to templates. Source: the documentation of Go's package text/template.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from octavo_engine.errors import ModelfileInvalid
from octavo_engine.text import go_nodes as nodes

if TYPE_CHECKING:
    from octavo_engine.text.go_nodes import Expression, Statement

_MAX_DEPTH: Final = 50  # of blocks and parentheses within each other
_MAX_CHARACTERS: Final = 1 << 20  # of a template

_FIELDS: Final = frozenset(
    {
        *("System", "Prompt", "Response", "Suffix", "Messages", "Tools"),  # what a template is given
        *("Think", "ThinkLevel", "IsThinkSet"),
        *("Role", "Content", "Thinking", "Images", "ToolCalls", "ToolName", "ToolCallID"),  # of a message
        *("Type", "Function", "Name", "Description", "Parameters", "Arguments", "Index", "ID"),  # of tools and calls
        *("Properties", "Required", "Enum", "Items"),
    }
)
_ACTION: Final = re.compile(r"\{\{(?P<left>-(?=\s))?(?P<body>.*?)(?P<right>(?<=\s)-)?\}\}", re.DOTALL)
_TOKEN: Final = re.compile(
    r"""(?P<space>\s+) | (?P<string>"(?:[^"\\\n]|\\.)*" | `[^`]*`) | (?P<number>-?\d+(?:\.\d+)?)
    | (?P<variable>\$\w*) | (?P<field>\.[A-Za-z_]\w*) | (?P<name>[A-Za-z_]\w*) | (?P<mark>:=|[=|(),.])""",
    re.VERBOSE | re.ASCII,
)
_COMMENT: Final = re.compile(r"\s*/\*.*\*/\s*", re.DOTALL)


def parse(source: str) -> tuple[list[Statement], frozenset[str]]:
    """Return what to run, and the names of all fields in it.

    Raises:
        ModelfileInvalid: it is not well formed, or uses what is not supported; the message names line and token.
    """
    if len(source) > _MAX_CHARACTERS:
        raise ModelfileInvalid(f"the template has {len(source)} characters; {_MAX_CHARACTERS} are the most")
    return _Parser(source).parse()


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    line: int
    is_joined: bool  # no space before it: a field is one of what stands there


class _Parser:
    """Goes through the pieces of the source once, a statement at a time."""

    def __init__(self, source: str) -> None:
        self._pieces = _pieces(source)  # text, or the tokens of an action
        self._position = 0
        self._tokens: list[_Token] = []
        self._next = 0
        self._fields: set[str] = set()
        self._variables = ["$"]
        self._depth = 0
        self._loops = 0

    def parse(self) -> tuple[list[Statement], frozenset[str]]:
        return self._block(()), frozenset(self._fields)

    def _block(self, ends: tuple[str, ...]) -> list[Statement]:
        """Parse up to one of `ends`, whose tokens are the current ones then; without ends, up to the end."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error("blocks are too deep")
        statements: list[Statement] = []
        num_variables = len(self._variables)
        while self._position < len(self._pieces):
            piece = self._pieces[self._position]
            self._position += 1
            if isinstance(piece, str):
                statements.append(nodes.text(piece))
                continue
            self._tokens, self._next = piece, 0
            if self._peek().text in ends:
                del self._variables[num_variables:]
                self._depth -= 1
                return statements
            statements.append(self._statement())
        if ends:
            raise self._error(f"{{{{ {ends[-1]} }}}} is missing")
        return statements

    def _statement(self) -> Statement:
        token = self._peek()
        match token.text if token.kind == "name" else "":
            case "if":
                return self._if()
            case "range":
                return self._range()
            case "with":
                return self._with()
            case "break" | "continue":
                self._take()
                if not self._loops:
                    raise self._error(f"{token.text} is in no range")
                self._end_action()
                return nodes.leave if token.text == "break" else nodes.go_on
            case "end" | "else" | "define" | "block" | "template":
                known = "has no beginning" if token.text in {"end", "else"} else "is not supported"
                raise self._error(f"{token.text} {known}")
        return self._output()

    def _if(self) -> Statement:
        self._take()
        num_variables = len(self._variables)
        condition = self._declaration_or_pipeline()
        self._end_action()
        then = self._block(("else", "end"))
        otherwise: list[Statement] = []
        if self._take().text == "else":
            if self._peek().text == "if":
                otherwise = [self._if()]  # its end is ours too
                del self._variables[num_variables:]
                return nodes.branch(condition, then, otherwise)
            self._end_action()
            otherwise = self._block(("end",))
            self._take()
        self._end_action()
        del self._variables[num_variables:]
        return nodes.branch(condition, then, otherwise)

    def _with(self) -> Statement:
        self._take()
        num_variables = len(self._variables)
        value = self._declaration_or_pipeline()
        self._end_action()
        then = self._block(("else", "end"))
        otherwise = self._otherwise()
        del self._variables[num_variables:]
        return nodes.with_dot(value, then, otherwise)

    def _range(self) -> Statement:
        self._take()
        num_variables = len(self._variables)
        names: list[str] = []
        if self._peek().kind == "variable" and self._declares():
            while self._peek().text != ":=":
                if self._peek().text != ",":
                    names.append(self._expect("variable").text)
                else:
                    self._take()
            self._take()
        if len(names) > 2:
            raise self._error("range has more than two variables")
        items = self._pipeline()
        self._end_action()
        self._variables += names
        self._loops += 1
        body = self._block(("else", "end"))
        self._loops -= 1
        otherwise = self._otherwise()
        del self._variables[num_variables:]
        return nodes.loop(items, names, body, otherwise)

    def _otherwise(self) -> list[Statement]:
        """Parse what may come between `else` and `end`."""
        statements: list[Statement] = []
        if self._take().text == "else":
            self._end_action()
            statements = self._block(("end",))
            self._take()
        self._end_action()
        return statements

    def _declares(self) -> bool:
        return any(token.text == ":=" for token in self._tokens)

    def _output(self) -> Statement:
        if self._peek().kind == "variable" and len(self._tokens) > 1 and self._tokens[1].text in {":=", "="}:
            statement = nodes.silent(self._declaration_or_pipeline())
        else:
            statement = nodes.output(self._pipeline())
        self._end_action()
        return statement

    def _declaration_or_pipeline(self) -> Expression:
        if self._peek().kind == "variable" and len(self._tokens) > self._next + 1:
            mark = self._tokens[self._next + 1].text
            if mark in {":=", "="}:
                name = self._take().text
                self._take()
                value = self._pipeline()
                if mark == ":=":
                    self._variables.append(name)
                elif name not in self._variables:
                    raise self._error(f"the variable {name} is not declared")
                return nodes.declaration(name, value, is_new=mark == ":=")
        return self._pipeline()

    def _pipeline(self) -> Expression:
        value = self._command(None)
        while self._peek().text == "|":
            self._take()
            value = self._command(value)
        return value

    def _command(self, piped: Expression | None) -> Expression:
        token = self._peek()
        if token.kind == "name" and token.text not in {"true", "false", "nil"}:
            self._take()
            if token.text not in nodes.FUNCTIONS:
                raise self._error(f"the function {token.text} is not supported; there are {', '.join(nodes.FUNCTIONS)}")
            arguments: list[Expression] = []
            while self._peek().text not in {"", ")", "|"}:
                arguments.append(self._operand())
            arguments += [piped] if piped is not None else []
            if len(arguments) not in nodes.FUNCTIONS[token.text][1]:
                raise self._error(f"{token.text} has {len(arguments)} arguments")
            return nodes.call(token.text, arguments)
        if piped is not None:
            raise self._error(f"{token.text or 'the end'} is not a function to pipe into")
        value = self._operand()
        if self._peek().text not in {"", ")", "|"}:
            raise self._error(f"{self._peek().text!r} is one operand too many")
        return value

    def _operand(self) -> Expression:
        token = self._take()
        if token.kind in {"string", "number", "name"}:
            return self._literal(token)
        match token.kind:
            case "variable":
                if token.text not in self._variables:
                    raise self._error(f"the variable {token.text} is not declared")
                return self._chain(nodes.variable(token.text))
            case "field":
                return self._chain(nodes.member(nodes.dot, self._field(token)))
            case "mark" if token.text == ".":
                return nodes.dot
            case "mark" if token.text == "(":
                self._depth += 1
                if self._depth > _MAX_DEPTH:
                    raise self._error("parentheses are too deep")
                value = self._pipeline()
                if self._take().text != ")":
                    raise self._error(") is missing")
                self._depth -= 1
                return self._chain(value)
        raise self._error(f"{token.text!r} is not expected here" if token.text else "something is missing")

    def _literal(self, token: _Token) -> Expression:
        names = {"true": True, "false": False, "nil": None}
        if token.kind == "string":
            return nodes.constant(self._string(token))
        if token.kind == "number":
            return nodes.constant(float(token.text) if "." in token.text else int(token.text))
        if token.text in names:
            return nodes.constant(names[token.text])
        if token.text in nodes.FUNCTIONS:
            return nodes.call(token.text, [])  # as an argument a function has none of its own
        raise self._error(f"the function {token.text} is not supported; there are {', '.join(nodes.FUNCTIONS)}")

    def _chain(self, value: Expression) -> Expression:
        while self._peek().kind == "field" and self._peek().is_joined:
            value = nodes.member(value, self._field(self._take()))
        return value

    def _field(self, token: _Token) -> str:
        name = token.text[1:]
        if name not in _FIELDS:
            raise self._error(f"the field {token.text} is not one that templates are given")
        self._fields.add(name)
        return name

    def _string(self, token: _Token) -> str:
        if token.text.startswith("`"):
            return token.text[1:-1]
        try:
            text: str = json.loads(token.text, strict=False)
        except ValueError:
            raise self._error(f"{token.text} has an escape that is not supported") from None
        return text

    def _peek(self) -> _Token:
        end = _Token("end", "", self._tokens[-1].line if self._tokens else 1, is_joined=False)
        return self._tokens[self._next] if self._next < len(self._tokens) else end

    def _take(self) -> _Token:
        token = self._peek()
        self._next += 1
        return token

    def _expect(self, kind: str) -> _Token:
        if self._peek().kind != kind:
            raise self._error(f"{self._peek().text!r} is no {kind}")
        return self._take()

    def _end_action(self) -> None:
        if self._peek().kind != "end":
            raise self._error(f"{self._peek().text!r} is not expected here")

    def _error(self, problem: str) -> ModelfileInvalid:
        return ModelfileInvalid(f"line {self._peek().line}: {problem}")


def _pieces(source: str) -> list[str | list[_Token]]:
    """Cut the source into text and the tokens of its actions; what a trim marker asks for is trimmed."""
    pieces: list[str | list[_Token]] = []
    position, trims = 0, False
    for match in _ACTION.finditer(source):
        text = source[position : match.start()]
        text = text.lstrip() if trims else text
        pieces.append(text.rstrip() if match["left"] else text)
        line = source.count("\n", 0, match.start("body")) + 1
        if not _COMMENT.fullmatch(match["body"]):
            pieces.append(_tokens(match["body"], line))
        position, trims = match.end(), bool(match["right"])
    rest = source[position:]
    if "{{" in rest:
        line = source.count("\n", 0, position + rest.index("{{")) + 1
        raise ModelfileInvalid(f"line {line}: {{{{ has no }}}}")
    pieces.append(rest.lstrip() if trims else rest)
    return [piece for piece in pieces if piece != ""]  # without tokens an action is kept, and refused


def _tokens(body: str, line: int) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    while position < len(body):
        match = _TOKEN.match(body, position)
        if match is None:
            raise ModelfileInvalid(f"line {line}: {body[position : position + 20]!r} is not supported")
        if match.lastgroup != "space":
            is_joined = position > 0 and not body[position - 1].isspace()
            tokens.append(_Token(match.lastgroup or "", match.group(), line, is_joined))
        line += match.group().count("\n")
        position = match.end()
    return tokens
