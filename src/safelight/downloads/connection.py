"""An HTTP client that connects to public addresses only, so that nobody can make a server fetch from its own network.

The address is checked where the connection is made, also after each redirect. So a name that resolves to another
address the second time cannot get past the check.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from collections.abc import Collection

import httpx

from safelight.errors import DownloadError
from safelight.version import VERSION

MOST_REDIRECTS = 10

TIMEOUT = httpx.Timeout(20.0)
"""Seconds without a byte, and to connect. A server that stops waits no longer for its downloads."""

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


class _Guarded(httpx.BaseTransport):
    """Connects to an address that it has checked.

    ``allowed``: hosts, with or without a port, that may have private addresses and be reached without TLS.
    """

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(one.lower() for one in allowed)
        proxy = next((os.environ[name] for name in PROXIES if os.environ.get(name)), None)
        self._through_proxy = proxy is not None
        self._proxied = None if proxy is None else httpx.HTTPTransport(proxy=proxy)
        self._direct: dict[str, httpx.HTTPTransport] = {}
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if self._is_allowed(url):
            return self._direct_to(url.host).handle_request(request)
        if url.scheme != "https":
            problem = f"{url.host} would be reached without TLS ({url.scheme}). Only https is allowed"
            raise DownloadError(str(url), f"{problem}, except for the hosts of the setting download_hosts")
        address = self._public_address(url)
        if self._proxied is not None:
            # The proxy looks the name up.
            return self._proxied.handle_request(request)
        to_address = httpx.Request(
            request.method,
            url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": url.host},
        )
        response = self._direct_to(url.host).handle_request(to_address)
        response.request = request
        return response

    def _direct_to(self, host: str) -> httpx.HTTPTransport:
        """Return the connections to a host. Two names may have the same address, but not the same certificate."""
        with self._lock:
            return self._direct.setdefault(host, httpx.HTTPTransport(retries=1))

    def _is_allowed(self, url: httpx.URL) -> bool:
        port = url.port or {"https": 443, "http": 80}.get(url.scheme, 0)
        return url.host.lower() in self._allowed or f"{url.host.lower()}:{port}" in self._allowed

    def _public_address(self, url: httpx.URL) -> str:
        """Return an address of the host. Raises DownloadError if one of its addresses is not public."""
        try:
            found = socket.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise DownloadError(str(url), f"{url.host[:80]} is no name of a host ({error})") from error
        except OSError as error:
            if self._through_proxy:
                return url.host
            raise httpx.ConnectError(f"{url.host} has no address ({error})") from error
        addresses = [str(one[4][0]) for one in found]
        for address in addresses:
            if not _is_public(address):
                problem = f"{url.host} has the address {address}, which is not public. Only public ones are allowed"
                raise DownloadError(str(url), f"{problem}, except for the hosts of the setting download_hosts")
        return addresses[0]

    def close(self) -> None:
        for transport in self._direct.values():
            transport.close()
        if self._proxied is not None:
            self._proxied.close()


_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses of IPv4 behind a NAT64 (RFC 6052): the last four bytes are those of IPv4."""

_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")
_PROTOCOLS = ipaddress.IPv4Network("192.0.0.0/24")
"""Ranges that some versions of Python count as public, or not (RFC 9637 and RFC 6890)."""


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv4Address):
        return parsed.is_global and not parsed.is_multicast and parsed not in _PROTOCOLS
    if parsed in _TRANSLATED:
        return _is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo or (None, None))[1]
    if inner is not None and not _is_public(str(inner)):
        return False
    if parsed.ipv4_mapped:
        return True
    return parsed in _GLOBAL_IPV6 and parsed not in _DOCUMENTATION and parsed.is_global


def open_client(allowed: Collection[str] = ()) -> httpx.Client:
    """Return a client. ``allowed``: the setting ``download_hosts``."""
    return httpx.Client(
        transport=_Guarded(allowed),
        timeout=TIMEOUT,
        follow_redirects=True,
        max_redirects=MOST_REDIRECTS,
        headers={"User-Agent": f"Safelight/{VERSION}", "Accept-Encoding": "identity"},
    )
