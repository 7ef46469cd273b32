"""Run folders in, numbers out: rows, spreads over seeds, the authors' points, and which SAEs belong into one figure."""

from switch_sae.results.export import frame, write_results
from switch_sae.results.rows import RESULTS, ResultRow, collect, finished_runs, load_members, scored
from switch_sae.results.summary import summary, write_summary

__all__ = ["RESULTS", "ResultRow", "collect", "finished_runs", "frame", "load_members", "scored", "summary", "write_results", "write_summary"]
