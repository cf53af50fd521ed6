"""A loop that is kept on disk is made anew when what it calls has changed."""

from __future__ import annotations

import shutil
import subprocess
import sys

from twhin_pipeline.kernels import compiled

CALLEE = "from twhin_pipeline.kernels.compiled import compiled\n\n@compiled()\ndef callee(a):\n    return a + {}\n"
CALLER = """from twhin_pipeline.graph.callee import callee
from twhin_pipeline.kernels.compiled import callback, compiled

@compiled()
def caller(a):
    return callee(a)

called_back = callback("int64(int64)", lambda a: callee(a))
"""
PROGRAM = """
from twhin_pipeline.model.caller import called_back, caller
print(caller(1), called_back.ctypes(1), sum(caller.stats.cache_hits.values()))
"""


def test_a_kept_loop_follows_a_change_of_what_it_calls(tmp_path):
    package = tmp_path / "twhin_pipeline"
    package.mkdir()
    (package / "kernels").mkdir()
    shutil.copy(compiled.__file__, package / "kernels")
    (package / "__init__.py").touch()
    (package / "kernels" / "__init__.py").touch()
    for folder in ("graph", "model"):
        (package / folder).mkdir()
    (package / "model" / "caller.py").write_text(CALLER)

    def told(added):
        (package / "graph" / "callee.py").write_text(CALLEE.format(added))
        done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert told(10) == ["11", "11", "0"]
    assert told(10) == ["11", "11", "1"]
    assert told(20) == ["21", "21", "0"]
