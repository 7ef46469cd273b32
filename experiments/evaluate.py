"""Scores a finished run again, on other rows or contexts of the same held-out text, and writes results-<rows>.json beside results.json.

python -m experiments.evaluate runs/2026-01-31_12-00-00_switch-e8 --rows 500000
"""

import argparse
from dataclasses import replace

from experiments.compose import clear_errors
from switch_sae.activations import build_source
from switch_sae.config import config_from_plain
from switch_sae.pipeline import calibration_rows, evaluate_members, resolve_device
from switch_sae.report import load_members, margins, table
from switch_sae.runs import RunDir


def evaluate_again(run: RunDir, rows: int | None = None, contexts: int | None = None) -> str:
    """Scores all SAEs and controls of the run and returns the name of the file, in its folder, that holds the results."""
    before = run.read_json("results.json")
    config = config_from_plain(run.read_json("config.json"))
    changes = {"rows": rows, "downstream_contexts": contexts}
    config = replace(config, evaluation=replace(config.evaluation, **{name: value for name, value in changes.items() if value is not None}))
    device, reason = resolve_device(config.device)
    print(f"device: {device} ({reason}); scoring on at most {config.evaluation.rows:,} rows")
    members = {name: sae.to(device) for name, sae in load_members(run).items()}
    source = build_source(config.source, config.batch_size, config.rows_read)
    try:
        now, then = source.describe(), before["evaluation"]["source"]
        changed = sorted(key for key in now.keys() | then.keys() if key not in ("device", "cache") and now.get(key) != then.get(key))
        if changed:
            print(f"note: these are not the activations of training; {', '.join(changed)} changed (another language model, text or Python version).")
        results = evaluate_members(config, members, source, calibration_rows(source, config.calibration_rows))
    finally:
        source.close()
    for name, entry in results["members"].items():
        entry |= {key: value for key, value in before["members"][name].items() if key not in entry}  # what training cost
    file = f"results-{config.evaluation.rows}.json"
    run.write_json(file, results)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--rows", type=int, help="held-out activations to score on; default: as in training")
    parser.add_argument("--contexts", type=int, help="contexts for delta CE and KL, 0 for none; default: as in training")
    arguments = parser.parse_args()
    with clear_errors():
        run = RunDir.open(arguments.run)
        file = evaluate_again(run, arguments.rows, arguments.contexts)
        print("\n" + table([run], file), margins(run, file), f"\nwritten: {run.path / file}", sep="\n")


if __name__ == "__main__":
    main()
