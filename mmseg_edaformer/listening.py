"""What the page and the server share: an address to listen on, and whom they answer."""
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from .errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; a ConfigError if it cannot."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigError(f'cannot listen on --host {host} --port {port} ({error}): give others; '
                          'port 0 is one that is free') from error


def find_stranger(host: str, origin: str | None, names: Collection[str]) -> str:
    """Return why a request with these headers is not answered, or nothing.

    Answered are requests to one of the ``names``, and none from pages of other sites: otherwise a
    site whose name is made to lead to this machine could read what is served here.
    """
    try:
        name = urlsplit(f'//{host}').hostname
    except ValueError:
        name = None
    if name not in names:
        return ('This server is not known by this host name. To allow it, start the server with '
                '--allow-host NAME.')
    if origin not in (None, f'http://{host}', f'https://{host}'):
        return ('This server does not answer requests from pages of other sites. A proxy has to '
                'pass on the Host header unchanged.')
    return ''
