"""The tests in `interpreted` belong to a process of their own: Triton reads TRITON_INTERPRET once, when it is imported,
and afterwards no kernel of that process can be compiled. `test_in_the_interpreter` starts that process."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
