"""Images from the network, from servers of this machine."""

import http.server
import io
import socket
import ssl
import threading
import time

import pytest
from PIL import Image

from tuning.data import image_download
from tuning.data.images import ImageRules, find_image, load_image, measure_image
from tuning.errors import UserError

WHERE = "rows.json, row 3, field 'images', image 0"
ALLOWED = ImageRules(allow_remote=True)
HANGS = 5.0  # seconds: longer than any test waits


def as_png() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((40, 30), 80).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


PNG = as_png()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        try:
            self.server.answers[self.path](self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def start_server():
    """A function that starts a server and returns it; `answers` maps paths to what is done with a request."""
    servers = []

    def start() -> http.server.ThreadingHTTPServer:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.answers, server.asked, server.over = {}, [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(start_server):
    return start_server()


def send(data: bytes, status=200, length: int | None = None, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = True

    return answer


def redirect(target: str, status=302):
    return send(b"", status, Location=target)


def send_without_end(handler):
    """Chunks and no length, until the other side has had enough."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.server.over.is_set():
        handler.wfile.write(b"2710\r\n" + b"a" * 0x2710 + b"\r\n")


def drip(handler):
    """A byte now and then."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"a")
        handler.wfile.flush()


def hang(handler):
    handler.server.over.wait(HANGS)
    handler.close_connection = True


def refused(url: str, rules=ALLOWED) -> str:
    """The message for an image that cannot be had; names the row."""
    with pytest.raises(UserError) as caught:
        load_image(url, None, WHERE, rules)
    assert caught.value.where == WHERE
    assert caught.value.kind == "remote image"
    return caught.value.problem


def test_nothing_is_fetched_unless_allowed(server):
    with pytest.raises(UserError, match="the image is on the network") as caught:
        load_image(f"{server.url}/x.png", None, WHERE)
    assert "allow_remote_images" in caught.value.fix
    assert server.asked == []


def test_an_image_is_fetched_with_its_query(server):
    server.answers["/a/x.png?size=2"] = send(PNG)
    url = f"{server.url}/a/x.png?size=2#part"
    assert load_image(url, None, WHERE, ALLOWED).size == (40, 30)
    assert measure_image({"bytes": None, "path": url}, None, WHERE, ALLOWED) == (40, 30)
    found = find_image(url, None, WHERE, ALLOWED)
    assert (found.content, found.format) == (PNG, "png")


def test_chunks_are_joined(server):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(PNG), 100):
            piece = PNG[start : start + 100]
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    server.answers["/x.png"] = answer
    assert find_image(f"{server.url}/x.png", None, WHERE, ALLOWED).content == PNG


def test_what_is_not_an_image_is_named(server):
    server.answers["/x.png"] = send(b"<html>Log in first</html>")
    with pytest.raises(UserError, match="it is not in a known image format"):
        load_image(f"{server.url}/x.png", None, WHERE, ALLOWED)


@pytest.mark.parametrize(("status", "words"), [(404, "404 Not Found"), (500, "500 Internal"), (204, "204 No Content")])
def test_another_answer_than_200_is_named(server, status, words):
    server.answers["/x.png"] = send(b"", status)
    assert f"the server answers {words}" in refused(f"{server.url}/x.png")


@pytest.mark.parametrize("status", image_download.REDIRECTS)
def test_no_redirect_into_a_private_network(server, start_server, status):
    inner = start_server()
    inner.answers["/secret.png"] = send(PNG)
    server.answers["/x.png"] = redirect(f"{inner.url}/secret.png", status)
    assert "it redirects to 127.0.0.1 (127.0.0.1), which is not a public address" in refused(f"{server.url}/x.png")
    assert inner.asked == []


@pytest.mark.parametrize("host", ["localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254", "10.0.0.1"])
def test_no_redirect_to_a_name_or_number_that_is_private(server, start_server, host):
    inner = start_server()
    server.answers["/x.png"] = redirect(f"http://{host}:{inner.server_port}/secret.png")
    message = refused(f"{server.url}/x.png")
    assert "which is not a public address" in message or "cannot be fetched: [Errno" in message  # no IPv6 here
    assert inner.asked == []


def test_no_redirect_to_the_same_server_if_it_is_private(server):
    server.answers.update({"/x.png": redirect("/y.png"), "/y.png": send(PNG)})
    assert "which is not a public address" in refused(f"{server.url}/x.png")
    assert server.asked == ["/x.png"]


@pytest.fixture
def example_org(server, monkeypatch):
    """A function that gives example.org some addresses. Connections to them end at `server`.

    Returns what was looked up and where connections went, by the name and the first address.
    """
    look_up, connect, found, connected = socket.getaddrinfo, socket.create_connection, [], []

    def resolve_to(*numbers: str) -> tuple[list, list]:
        def find(host, port, *rest, **options):
            if host != "example.org":
                return look_up(host, port, *rest, **options)
            found.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in numbers]

        def connect_here(address, *rest, **options):
            connected.append(address)
            return connect(("127.0.0.1", server.server_port), *rest, **options)

        monkeypatch.setattr(socket, "getaddrinfo", find)
        monkeypatch.setattr(socket, "create_connection", connect_here)
        return found, connected

    return resolve_to


def test_no_redirect_to_a_name_of_which_one_address_is_private(server, example_org):
    _, connected = example_org("93.184.216.34", "10.0.0.1")
    server.answers["/x.png"] = redirect("http://example.org/y.png")
    assert "it redirects to example.org (10.0.0.1), which is not a public address" in refused(f"{server.url}/x.png")
    assert len(connected) == 1
    assert server.asked == ["/x.png"]


@pytest.mark.parametrize(
    ("address", "host"), [("example.org", "example.org"), ("example.org:8080", "example.org:8080")]
)
def test_a_public_redirect_is_followed_to_the_address_that_was_checked(server, example_org, address, host):
    """The name is looked up once: a second answer could be a private address."""
    found, connected = example_org("93.184.216.34")
    hosts = []

    def answer(handler):
        hosts.append(handler.headers["Host"])
        send(PNG)(handler)

    server.answers.update({"/x.png": redirect(f"http://{address}/y.png"), "/y.png": answer})
    assert load_image(f"{server.url}/x.png", None, WHERE, ALLOWED).size == (40, 30)
    port = 8080 if ":" in address else 80
    assert (found, connected[1:]) == (["example.org"], [("93.184.216.34", port)])
    assert hosts == [host]
    assert server.asked == ["/x.png", "/y.png"]


def test_a_pinned_address_still_has_to_show_the_certificate_of_its_name(server, example_org, monkeypatch):
    """The TLS connection is made for the name, although it goes to the number."""
    names = []

    class Context(ssl.SSLContext):
        def wrap_socket(self, *_, server_hostname=None, **__):
            names.append(server_hostname)
            raise ssl.SSLError("no certificate here")

    example_org("93.184.216.34")
    monkeypatch.setattr(image_download, "_certificates", lambda: Context(ssl.PROTOCOL_TLS_CLIENT))
    server.answers["/x.png"] = redirect("https://example.org/y.png")
    assert "no certificate here" in refused(f"{server.url}/x.png")
    assert names == ["example.org"]


def test_nothing_but_the_address_is_sent(server, monkeypatch):
    """No cookie of an earlier answer, no password in the address, no proxy of the environment, no compression."""
    requests = []

    def answer_with(answer):
        return lambda handler: (requests.append(handler.headers), answer(handler))

    server.answers["/x.png"] = answer_with(send(b"", 302, **{"Location": "/y.png", "Set-Cookie": "a=b"}))
    server.answers["/y.png"] = answer_with(send(PNG))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(image_download, "_is_public", lambda number: True)
    address = server.url.replace("://", "://user:secret@")
    assert load_image(f"{address}/x.png", None, WHERE, ALLOWED).size == (40, 30)
    assert len(requests) == 2
    for headers in requests:
        assert headers["Cookie"] is headers["Authorization"] is None
        assert headers["Accept-Encoding"] == "identity"
        assert "secret" not in headers["Host"]


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://example.org/x.png", "data:image/png;base64,aaaa"])
def test_no_redirect_to_anything_but_http(server, target):
    server.answers["/x.png"] = redirect(target)
    assert f"it leads to {target[:20]}" in refused(f"{server.url}/x.png")


def test_redirects_come_to_an_end(server, monkeypatch):
    monkeypatch.setattr(image_download, "_is_public", lambda number: True)
    server.answers["/x.png"] = redirect("/x.png")
    assert "more than 5 redirects" in refused(f"{server.url}/x.png")
    assert len(server.asked) == 6


def test_a_redirect_to_nowhere_is_an_answer_that_is_no_image(server):
    server.answers["/x.png"] = send(b"", 302)
    assert "the server answers 302" in refused(f"{server.url}/x.png")


@pytest.mark.parametrize("answer", [send(PNG), send_without_end], ids=["length", "no length"])
def test_no_more_than_the_limit_is_read(server, answer):
    server.answers["/x.png"] = answer
    rules = ImageRules(allow_remote=True, max_bytes=len(PNG) - 1)
    assert "it is larger than max_image_megabytes" in refused(f"{server.url}/x.png", rules)


def test_an_image_as_large_as_the_limit_is_read(server):
    server.answers["/x.png"] = send(PNG)
    rules = ImageRules(allow_remote=True, max_bytes=len(PNG))
    assert load_image(f"{server.url}/x.png", None, WHERE, rules).size == (40, 30)


def test_an_image_that_breaks_off_is_refused(server):
    """Its header alone would pass."""
    server.answers["/x.png"] = send(PNG[:-500], length=len(PNG))
    assert "the connection broke off" in refused(f"{server.url}/x.png")


def test_a_server_that_does_not_answer_is_given_up(server, monkeypatch):
    monkeypatch.setattr(image_download, "TIMEOUT", 0.2)
    server.answers["/x.png"] = hang
    start = time.monotonic()
    assert "no answer in time" in refused(f"{server.url}/x.png")
    assert time.monotonic() - start < HANGS


def test_a_server_that_drips_is_given_up(server, monkeypatch):
    monkeypatch.setattr(image_download, "DEADLINE", 0.3)
    server.answers["/x.png"] = drip
    start = time.monotonic()
    assert "no answer in time" in refused(f"{server.url}/x.png")
    assert time.monotonic() - start < HANGS


def test_no_server_at_all_is_named():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    assert "cannot be fetched" in refused(f"http://127.0.0.1:{port}/x.png")


@pytest.mark.parametrize("url", ["http://", "http:///x.png", "http://127.0.0.1:none/x.png", "http://[::1/x.png"])
def test_an_address_that_is_none_is_named(url):
    assert "cannot be fetched" in refused(url)


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/a b.png", "/a%20b.png"), ("/a%20b.png", "/a%20b.png"), ("/ü?w=é", "/%C3%BC?w=%C3%A9"), ("", "/")],
)
def test_odd_paths_are_asked_for_as_browsers_do(server, path, asked):
    server.answers[asked] = send(PNG)
    assert load_image(f"{server.url}{path}", None, WHERE, ALLOWED).size == (40, 30)


def test_a_line_break_in_an_address_is_no_header(server):
    server.answers["/x.pngX-Header:%201"] = send(PNG)
    assert load_image(f"{server.url}/x.png\r\nX-Header: 1", None, WHERE, ALLOWED).size == (40, 30)
