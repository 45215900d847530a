"""The runner of jobs whose words are a Python program: `python plain_runner.py FOLDER`."""

import sys
from pathlib import Path

from mmdit.ui import job_files, job_runner

job_files.Job.argv = property(lambda job: [sys.executable, *job.words])

if __name__ == "__main__":
    job_runner.Runner(Path(sys.argv[1])).run()
