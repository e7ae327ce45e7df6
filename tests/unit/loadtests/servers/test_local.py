"""Finding the processes of a server."""

import os
import subprocess
import sys

from loadtests.servers import local


def test_marked_processes_are_found_even_where_one_has_overwritten_the_mark() -> None:
    child = "import sys; print('up', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], env={{}})"
    environment = {**os.environ, "BORG_TEST_MARK": "here"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", parent], env=environment, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        found = local.marked("BORG_TEST_MARK", "here")
        assert len(found) == 2
        assert process.pid in {one.pid for one in found}
        assert local.marked("BORG_TEST_MARK", "elsewhere") == []
        process.communicate()
