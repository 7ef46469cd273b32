"""A trained SAE onto the Hugging Face hub, with a card made from its run. Needs a token: `hf auth login`, or HF_TOKEN.

python -m experiments.push runs/2026-01-31_12-00-00_switch user/my-saes
python -m experiments.push runs/2026-01-31_12-00-00_switch user/my-saes/layer_2 --private
"""

from pathlib import Path

from switch_sae import push_to_hub
from switch_sae.files import user_path

from .arguments import parser_of
from .errors import clear_errors


def push(sae: Path, repo: str, private: bool, replace_card: bool) -> str:
    """What was done, and how to load it again. Raises as `push_to_hub`."""
    sent = push_to_hub(sae, repo, private=private, replace_card=replace_card)
    return f'sent to {sent["repo"]}, commit {sent["commit"]}\nload_sae("{repo}", revision="{sent["commit"]}")'


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("sae", type=user_path, metavar="RUN", help="a run folder, or what else load_sae reads")
    parser.add_argument("repo", metavar="REPO", help="user/repo or user/repo/folder; made where there is none")
    parser.add_argument("--private", action="store_true", help="where the repository is new, only you see it")
    parser.add_argument("--replace-card", action="store_true", help="write the card anew where the repository has one")
    arguments = parser.parse_args()
    with clear_errors():
        print(push(arguments.sae, arguments.repo, arguments.private, arguments.replace_card))


if __name__ == "__main__":
    main()
