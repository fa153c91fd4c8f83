"""Images from the network, for those who allow it: with a time-out, a size limit, and no way into private networks."""

import http.client
import ipaddress
import socket
import time
from urllib.parse import quote, urljoin, urlsplit

from tuning.errors import UserError

TIMEOUT = 10.0  # seconds without an answer
DEADLINE = 60.0  # seconds for all of an image
MAX_REDIRECTS = 5
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
REDIRECTS = (301, 302, 303, 307, 308)


def fetch_image(url: str, where: str, *, max_bytes: int) -> bytes:
    """The bytes at an `http(s)` address; follows redirects, but none to an address that is not public.

    Raises `UserError` when they cannot be had, are more than `max_bytes`, or take longer than the time limits.
    """
    limit = time.monotonic() + DEADLINE
    target = url
    try:
        for hop in range(MAX_REDIRECTS + 1):
            connection = _connect(target, public_only=hop > 0)
            try:
                connection.request("GET", _path_of(target), headers={"User-Agent": "vlm-tuning"})
                response = connection.getresponse()
                location = response.getheader("Location")
                if response.status not in REDIRECTS or location is None:
                    return _read(response, max_bytes, limit)
                target = urljoin(target, location)
            finally:
                connection.close()
        raise ValueError(f"more than {MAX_REDIRECTS} redirects")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        raise UserError(
            where=where,
            problem=f"the image {url[:200]} cannot be fetched: {reason}.",
            fix="Download it or drop the row.",
            kind="remote image",
        ) from error


def _path_of(url: str) -> str:
    """Path and query in ASCII, as browsers send them; what is encoded already stays."""
    parts = urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    return quote((parts.path or "/") + query, safe="/?%!$&'()*+,;=:@~")


def _connect(url: str, *, public_only: bool) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not parts.hostname:
        raise ValueError(f"it leads to {url[:200]}")
    connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=TIMEOUT)
    if public_only:
        # The address that was checked is the one connected to: a name could resolve differently the second time.
        connection._create_connection = _connect_to_public_address  # type: ignore[attr-defined]
    return connection


def _connect_to_public_address(address: tuple[str, int], timeout: float, source_address=None) -> socket.socket:
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    numbers = [str(entry[4][0]) for entry in found]
    if private := next((number for number in numbers if not _is_public(number)), None):
        raise ValueError(f"it redirects to {address[0]} ({private}), which is not a public address")
    return socket.create_connection((numbers[0], address[1]), timeout, source_address)


def _read(response: http.client.HTTPResponse, max_bytes: int, limit: float) -> bytes:
    if response.status != 200:
        raise ValueError(f"the server answers {response.status} {response.reason}")
    data = bytearray()
    while chunk := response.read1(1 << 16):
        data += chunk
        if len(data) > max_bytes:
            raise ValueError(f"it is larger than max_image_megabytes {max_bytes / 1e6:g}")
        if time.monotonic() > limit:
            raise TimeoutError
    if response.length:
        raise ValueError("the connection broke off")
    return bytes(data)


def _is_public(number: str) -> bool:
    """Whether an address is a public one; IPv6 forms that lead to an IPv4 address are judged by that one."""
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = ipaddress.ip_address(number)
    if isinstance(address, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None
        address = address.ipv4_mapped or address.sixtofour or nat64 or address
    return address is not None and address.is_global and not address.is_multicast
