"""Downloads images: with time limits, a size limit, and no redirect into a private network."""

import contextlib
import functools
import ipaddress
import socket
import ssl
import time
from urllib.parse import urljoin, urlsplit

import httpx

from tuning.errors import UserError, first_line

TIMEOUT = 10.0  # seconds without an answer
DEADLINE = 60.0  # seconds for a whole image
MAX_REDIRECTS = 5
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"User-Agent": "vlm-tuning", "Accept-Encoding": "identity"}


def fetch_image(url: str, where: str, *, max_bytes: int) -> bytes:
    """The bytes at an `http(s)` address. Follows redirects to public addresses only.

    Raises `UserError` where the download fails, has more than `max_bytes`, or takes longer than the time limits.
    """
    deadline = time.monotonic() + DEADLINE
    try:
        target = urlsplit(url).geturl()  # without line breaks
        for hop in range(MAX_REDIRECTS + 1):
            request = _make_request(target, public_only=hop > 0)
            # A bare transport: a client would add cookies, passwords and proxies, and look into redirects itself.
            transport = httpx.HTTPTransport(verify=_certificates(), trust_env=False)
            with transport, contextlib.closing(transport.handle_request(request)) as response:
                location = response.headers.get("Location")
                if response.status_code not in REDIRECTS or location is None:
                    return _read(response, max_bytes, deadline)
            target = urljoin(target, location)
        raise ValueError(f"more than {MAX_REDIRECTS} redirects")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        is_late = isinstance(error, (httpx.TimeoutException, TimeoutError))
        reason = "no answer in time" if is_late else first_line(error)
        raise UserError(
            where=where,
            problem=f"the image {url[:200]} cannot be fetched: {reason}.",
            fix="Download it or drop the row.",
            kind="remote image",
        ) from error


@functools.cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


def _make_request(target: str, *, public_only: bool) -> httpx.Request:
    url = httpx.URL(target)
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"it leads to {target[:200]}")
    name = url.raw_host.decode("ascii")
    headers = {**HEADERS, "Host": url.netloc.decode("ascii")}
    # The request goes to the address that was checked, because the name could resolve differently the second time. The
    # server and its certificate are still asked for by name.
    address = url.copy_with(host=_find_public_address(name)) if public_only else url
    extensions = {"timeout": httpx.Timeout(TIMEOUT).as_dict(), "sni_hostname": name}
    return httpx.Request("GET", address, headers=headers, extensions=extensions)


def _find_public_address(name: str) -> str:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    numbers = [str(entry[4][0]) for entry in found]
    if private := next((number for number in numbers if not _is_public(number)), None):
        raise ValueError(f"it redirects to {name} ({private}), which is not a public address")
    return numbers[0]


def _read(response: httpx.Response, max_bytes: int, deadline: float) -> bytes:
    if response.status_code != 200:
        raise ValueError(f"the server answers {response.status_code} {response.reason_phrase}")
    data = bytearray()
    try:
        for chunk in response.iter_raw():  # not decompressed, which could make a small answer huge
            data += chunk
            if len(data) > max_bytes:
                raise ValueError(f"it is larger than max_image_megabytes {max_bytes / 1e6:g}")
            if time.monotonic() > deadline:
                raise TimeoutError
    except httpx.RemoteProtocolError as error:
        raise ValueError("the connection broke off") from error
    return bytes(data)


def _is_public(number: str) -> bool:
    """Whether an address is public. An IPv6 form of an IPv4 address is public where that address is."""
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = ipaddress.ip_address(number)
    if isinstance(address, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None
        address = address.ipv4_mapped or address.sixtofour or nat64 or address
    return address is not None and address.is_global and not address.is_multicast
