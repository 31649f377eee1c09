"""Scripts by which shells complete the words of `octavo`, made of its parser. Called by the command line.

Options and their choices come from the parser; the names of models from `octavo list` when the key is pressed; where a
path may stand the shell completes files by itself.
"""

from __future__ import annotations

import argparse
from typing import Final

_MODELS: Final = "octavo list 2>/dev/null | awk 'NR > 1 {print $1}'"
_TAKES_MODEL: Final = frozenset({"model", "models", "source"})

_BASH: Final = """\
_octavo() {{
    local before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}" word="${{COMP_LINE:0:COMP_POINT}}" colon
    word="${{word##*[[:space:]]}}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case "$command $before" in
{choices}
    esac
    case "$command" in
{options}
    esac
    if [[ $word == *:* && $COMP_WORDBREAKS == *:* ]]; then  # what stands before a colon is another word to bash
        colon="${{word%"${{word##*:}}"}}"
        COMPREPLY=("${{COMPREPLY[@]#"$colon"}}")
    fi
}}
complete -o default -F _octavo octavo
"""


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return what `shell` (bash, zsh or fish) is to evaluate."""
    commands = _commands(parser)
    if shell == "fish":
        return _fish(commands)
    text = _bash(commands)
    # zsh has bash's completion as a module of its own (zshcompsys(1), bashcompinit).
    return f"autoload -U +X compinit bashcompinit && compinit && bashcompinit\n{text}" if shell == "zsh" else text


def _bash(commands: dict[str, argparse.ArgumentParser]) -> str:
    choices, options = [], []
    for name, command in commands.items():
        for action in command._actions:  # noqa: SLF001 - argparse has no public way to list what it takes
            if action.choices and action.option_strings:
                words = " ".join(map(str, action.choices))
                patterns = "|".join(f'"{name} {option}"' for option in action.option_strings)
                choices.append(f'        {patterns}) COMPREPLY=($(compgen -W "{words}" -- "$word")); return;;')
        words = " ".join(_words(command))
        models = f" $({_MODELS})" if _takes_models(command) else ""
        options.append(f'        {name}) COMPREPLY=($(compgen -W "{words}{models}" -- "$word"));;')
    return _BASH.format(commands=" ".join(commands), choices="\n".join(choices), options="\n".join(options))


def _fish(commands: dict[str, argparse.ArgumentParser]) -> str:
    lines = [f"complete -c octavo -n __fish_use_subcommand -f -a {name}" for name in commands]
    for name, command in commands.items():
        seen = f"complete -c octavo -n '__fish_seen_subcommand_from {name}'"
        for action in command._actions:  # noqa: SLF001 - as above
            long = [option.removeprefix("--") for option in action.option_strings if option.startswith("--")]
            takes = " -r" if action.nargs != 0 else ""
            words = f" -f -a '{' '.join(map(str, action.choices))}'" if action.choices else ""
            lines += [f"{seen} -l {option}{takes}{words}" for option in long]
            if not action.option_strings and words:
                lines.append(f"{seen}{words}")
        if _takes_models(command):
            lines.append(f'{seen} -a "({_MODELS.replace("$", chr(92) + "$")})"')
    return "\n".join(lines) + "\n"


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))  # noqa: SLF001 - as above
    return dict(commands.choices)


def _words(command: argparse.ArgumentParser) -> list[str]:
    """The options of a command, and the choices of what stands without one."""
    actions = command._actions  # noqa: SLF001 - as above
    options = [option for action in actions for option in action.option_strings if option.startswith("--")]
    return options + [str(one) for action in actions if not action.option_strings for one in action.choices or ()]


def _takes_models(command: argparse.ArgumentParser) -> bool:
    return any(action.dest in _TAKES_MODEL for action in command._actions)  # noqa: SLF001 - as above
