#!/usr/bin/env bash
# A Chromium for the tests of the lab's pages: the system's, or one of Playwright's own. They are skipped without one.
set -euo pipefail
python="$1"
if command -v chromium-headless-shell chromium chromium-browser google-chrome >/dev/null; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq || true
  for browser in chromium-headless-shell chromium; do
    if apt-get install -y -qq --no-install-recommends "$browser" fonts-dejavu-core >/dev/null; then exit 0; fi
  done
fi
"$python" -m playwright install chromium || echo "No Chromium could be installed: tests of the lab's pages will be skipped." >&2
