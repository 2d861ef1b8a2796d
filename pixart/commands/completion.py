"""Print a script with which a shell completes the commands and their options.

With eval "$(pixart completion bash)" in ~/.bashrc each new shell has the completion. All other words are completed as
files.

examples:
    pixart completion bash
"""

import argparse

BASH = """\
_pixart() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} words=
    COMPREPLY=()
    if [ "$COMP_CWORD" = 1 ]; then
        words="{commands} --help --version"
    else
        case "${{COMP_WORDS[1]}} $before" in
{choices}
        esac
        if [ -z "$words" ] && [ "${{word:0:1}}" = - ]; then
            case "${{COMP_WORDS[1]}}" in
{options}
            esac
        fi
    fi
    [ -z "$words" ] || COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _pixart pixart"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash"], help="the shell that reads the script")


def main(arguments: argparse.Namespace) -> None:
    from pixart.commands import COMMANDS, make_parser

    options, choices = [], []
    for name in COMMANDS:
        actions = [action for action in make_parser(name)._actions if action.option_strings]
        every = " ".join(option for action in actions for option in action.option_strings)
        options.append(f'                {name}) words="{every}" ;;')
        for action in actions:
            if action.choices:
                patterns = " | ".join(f'"{name} {option}"' for option in action.option_strings)
                choices.append(f'            {patterns}) words="{" ".join(map(str, action.choices))}" ;;')
    print(BASH.format(commands=" ".join(COMMANDS), choices="\n".join(choices), options="\n".join(options)))
