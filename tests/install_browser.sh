#!/usr/bin/env bash
# A Chromium for the tests of the lab's pages: the system's, or one of Playwright's own. They are skipped without one.
set -euo pipefail
python="$1"
if command -v chromium chromium-browser google-chrome >/dev/null; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  if apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; then exit 0; fi
fi
"$python" -m playwright install chromium || echo "No Chromium could be installed: tests of the lab's pages will be skipped." >&2
