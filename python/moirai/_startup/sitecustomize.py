"""Loaded by `site` in each Python that `moirai run` or `moirai compare` starts; then steps aside.

This directory is put in front of PYTHONPATH for the program and its children. After the hook is
in place the directory leaves `sys.path` and this module leaves `sys.modules`, and `site` goes on to
whatever `sitecustomize` it would have found without us: the same one, or the same ImportError.

Any Python may find this file, an older one too: it keeps to the syntax they all share.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
# The launcher names its own build: another interpreter cannot load that build's native module.
_BUILD = "%s%s" % (sys.implementation.cache_tag, getattr(sys, "abiflags", ""))  # noqa: UP031

if os.environ.get("MOIRAI_BUILD") == _BUILD:
    try:
        import moirai_hook  # type: ignore[import-not-found, unused-ignore]

        moirai_hook.start()
    except Exception as error:  # The program is the user's: it runs without us then.
        sys.stderr.write("moirai: run: the startup hook failed: %r\n" % (error,))  # noqa: UP031

sys.path[:] = [entry for entry in sys.path if not entry or os.path.abspath(entry) != _HERE]
del sys.modules["sitecustomize"]
# The next one on the path, if there is any.
import sitecustomize  # type: ignore[import-not-found, unused-ignore]  # noqa: E402, F401
