"""A viser server that only its own pages may talk to.

A browser lets any web page open a websocket to this machine. It says by the header ``Origin`` which page asks, and by
``Host`` under which name it asked; viser looks at neither.
"""

from __future__ import annotations

import contextlib
import functools
import http
import inspect
import ipaddress
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import viser


def start_server(host: str, port: int) -> viser.ViserServer:
    """An empty server that refuses (403) what `is_own` refuses.

    Raises:
        RuntimeError: this release of viser starts its server in another way, so that nothing could be refused.
        ModuleNotFoundError: viser is not installed.
    """
    import viser

    with _guarded(host) as uses:
        server = viser.ViserServer(host, port, label="subspace3d", verbose=False)
    if not uses:
        server.stop()
        raise RuntimeError(f"viser {viser.__version__} starts its server in a way in which origins cannot be checked")
    return server


def is_own(origin: str | None, host: str | None, served: str) -> bool:
    """Whether a request comes from a page of this server, or from no page at all.

    The name it was asked under must be an address, localhost, this machine's name or ``served``: another name may have
    been pointed at this machine by the page that asks. A page's origin must be that very host and port.

    Args:
        origin (str | None): header ``Origin``; only browsers send one.
        host (str | None): header ``Host``.
        served (str): what the server listens on.
    """
    asked = _parts(f"//{host}")
    if host is None or asked is None or not _is_known(asked[0], served):
        return False
    return origin is None or (_parts(origin) == asked and urlsplit(origin).scheme in ("http", "https"))


def _parts(url: str) -> tuple[str, int | None] | None:
    try:
        split = urlsplit(url)
        return (split.hostname.lower(), split.port) if split.hostname else None
    except ValueError:
        return None


def _is_known(name: str, served: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name in {"localhost", served.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}


@contextlib.contextmanager
def _guarded(served: str) -> Iterator[list[str]]:
    """While it lasts, servers of websockets are made with the check; yields one entry for each."""
    import websockets.asyncio.server as module
    from websockets.datastructures import Headers
    from websockets.http11 import Response

    original, uses = module.serve, []

    def refuse(connection: Any, request: Any, then: Any) -> Any:
        if is_own(request.headers.get("Origin"), request.headers.get("Host"), served):
            return None if then is None else then(connection, request)
        text = b"only this viewer's own page may ask\n"
        return Response(http.HTTPStatus.FORBIDDEN, "Forbidden", Headers({"Content-Length": str(len(text))}), text)

    async def refuse_later(connection: Any, request: Any, then: Any) -> Any:
        response = refuse(connection, request, then)
        return await response if inspect.isawaitable(response) else response

    @functools.wraps(original)
    def serve(*args: Any, process_request: Any = None, **kwargs: Any) -> Any:
        uses.append(served)
        check = functools.partial(refuse_later, then=process_request)
        return original(*args, process_request=check, **kwargs)

    module.serve = serve  # type: ignore[misc, assignment]
    try:
        yield uses
    finally:
        module.serve = original  # type: ignore[misc]
