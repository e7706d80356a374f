"""The page at /: a chat in the browser, from one file; and the policy that its browser holds it to."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "page.html").read_text(encoding="utf-8")


def _sources(tag: str) -> str:
    """The hashes of a tag's contents: nothing else of that kind runs in the page."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


# It may ask its own server, and nobody else; data: is for its icon.
POLICY = "; ".join([
    "default-src 'none'", "connect-src 'self'", "img-src data:", f"script-src {_sources('script')}",
    f"style-src {_sources('style')}", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
])  # fmt: skip
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a newer release has a newer page
}
