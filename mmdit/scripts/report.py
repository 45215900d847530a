"""Write one HTML file about a run, to send to others: curves, samples, configuration, versions.

mmdit report runs/my_run --out report.html

The file has everything inside it, needs no network and no script, and is at most 10 MB large. The
run may still be going on, or have failed. Captions and settings of the run are in it.
"""

from pathlib import Path

from mmdit.files import write_atomically
from mmdit.scripts import command_parser, friendly, run
from mmdit.training.samples import check_writable
from mmdit.ui.run_report import RunReport


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", help="HTML file to write [report.html in the run folder]")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        report = RunReport(Path(args.run))
        out = Path(args.out or Path(args.run) / "report.html")
        check_writable(out, folder=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, report.page())
        print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run(main)
