"""The homework's programs as students write them, right but for one classic mistake.

    mistakes.py ROLE MISTAKE OPTIONS

ROLE is revproc, server or client, with the homework's options; MISTAKE is none, or one of those
that the code asks for.
"""

import base64
import hashlib
import json
import socket
import sys
import threading
import time

ROLE, MISTAKE = sys.argv[1:3]
OPTIONS = dict(zip(sys.argv[3::2], sys.argv[4::2]))


def port(option):
    return int(OPTIONS[option])


def is_mistaken(mistake):
    return MISTAKE == mistake


def packets(connection):
    """The packets of a connection, until its end."""
    buffer = b""
    while True:
        data = connection.recv(2048)
        if not data:
            return
        buffer += data
        while buffer.strip():
            if is_mistaken("one-recv"):
                packet, end = json.loads(buffer.decode()), len(buffer)
            else:
                try:
                    text = buffer.decode().lstrip()
                    packet, end = json.JSONDecoder().raw_decode(text)
                except ValueError:
                    break
                end = len(buffer) - len(text[end:].encode())
                if is_mistaken("two-packets"):
                    json.loads(buffer)
            yield packet
            buffer = buffer[end:]


def send(connection, packet):
    connection.sendall(json.dumps(packet).encode())


def number(value):
    return str(value) if is_mistaken("strings") else int(value)


def name(value):
    return value if is_mistaken("strings") or not value.isdigit() else int(value)


def listen(at):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", at))
    listener.listen(100)
    return listener


def serve(listener, answer):
    while True:
        connection, _ = listener.accept()
        if is_mistaken("one-at-a-time"):
            handle(connection, answer)
        else:
            threading.Thread(target=handle, args=(connection, answer), daemon=True).start()


def handle(connection, answer):
    with connection:
        try:
            for packet in packets(connection):
                answer(connection, packet)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print("connection lost:", repr(error), file=sys.stderr)


TABLE, TURNS, LOCK = {}, {}, threading.Lock()


def register(packet):
    policy = str(packet.get("privPolyId", packet.get("privPoliId")))
    server = (str(packet["id"]), int(packet["listenport"]))
    with LOCK:
        servers = TABLE.setdefault(policy, [])
        ids = [known for known, _ in servers]
        if server[0] in ids:
            servers[ids.index(server[0])] = server
        else:
            servers.append(server)
        TURNS.setdefault(policy, 0)
        if is_mistaken("rotation"):
            TURNS.update(dict.fromkeys(TURNS, 0))
    print("Receiving setup message from server id", server[0], "privacy policy", policy, "port", server[1])


def next_server(policy):
    with LOCK:
        turn = TURNS[policy]
        TURNS[policy] = (turn + 1) % len(TABLE[policy])
        return TABLE[policy][turn]


def forward(connection, packet):
    policy, payload = str(packet["privPoliId"]), packet["payload"]
    print("Received a data message from client", packet["srcid"], "privacy policy", policy, "payload:", payload)
    for _ in range(len(TABLE.get(policy, []))):
        server, at = next_server(policy)
        print("Forwarding a data message to server id", server, "payload:", payload)
        try:
            with socket.create_connection(("127.0.0.1", at)) as upstream:
                send(upstream, packet)
                ack = next(packets(upstream))
        except (OSError, StopIteration):
            continue
        print("Received a data message from server id", server, "payload:", ack["payload"])
        print("Forwarding a data message to client id", packet["srcid"], "payload:", ack["payload"])
        send(connection, ack)
        return
    if policy in TABLE or not is_mistaken("no-answer"):
        reason = "no server for privacy policy " + policy
        send(connection, {"type": 3, "srcid": 0, "destid": packet["srcid"], "payloadsize": len(reason), "payload": reason})


def revproc():
    def answer(connection, packet):
        if str(packet["type"]) == "1":
            register(packet)
        elif str(packet["type"]) == "0":
            forward(connection, packet)

    print("Running the reverse proxy on port", OPTIONS["-port"])
    serve(listen(port("-port")), answer)


KEPT = hashlib.sha1()


def server():
    def answer(connection, packet):
        payload = packet["payload"]
        print("Received a message from client", packet["srcid"], "payload:", payload)
        digest = KEPT if is_mistaken("kept-hash") else hashlib.sha1()
        hashed = payload
        if is_mistaken("whole-packet"):
            hashed = json.dumps(packet)
        elif is_mistaken("quoted"):
            hashed = json.dumps(payload)
        digest.update(hashed.encode("latin-1" if is_mistaken("latin-1") else "utf-8"))
        ack = {"type": number(2), "srcid": name(OPTIONS["-id"]), "destid": packet["srcid"], "payloadsize": number(40)}
        if is_mistaken("fixed-ids"):
            ack.update(srcid=100, destid=50)
        ack["payload"] = digest.hexdigest()
        if is_mistaken("upper-case"):
            ack["payload"] = ack["payload"].upper()
        elif is_mistaken("base64"):
            ack["payload"] = base64.b64encode(digest.digest()).decode()
        elif is_mistaken("no-zeros"):
            ack["payload"] = f"{int(digest.hexdigest(), 16):x}"
        if is_mistaken("no-destid"):
            del ack["destid"]
        print("Sending a response to the client", packet["srcid"], "payload:", ack["payload"])
        send(connection, ack)

    def set_up():
        print("Connecting to the reverse proxy on port", OPTIONS["-revproc"])
        with socket.create_connection(("127.0.0.1", port("-revproc"))) as connection:
            server = "100" if is_mistaken("fixed-id") else OPTIONS["-id"]
            policy = "PP_1" if is_mistaken("fixed-policy") else OPTIONS["-pp"]
            send(connection, {"type": number(1), "id": name(server), "privPolyId": policy, "listenport": number(OPTIONS["-listen"])})

    print("Server running with id", OPTIONS["-id"])
    print("Server serving privacy policy", OPTIONS["-pp"])
    if is_mistaken("late-listen"):
        set_up()
        time.sleep(0.3)
    listener = listen(port("-listen"))
    print("Listening on port", OPTIONS["-listen"])
    if not is_mistaken("late-listen"):
        set_up()
    serve(listener, answer)


def client():
    with open(OPTIONS["-pkt"], encoding="utf-8") as file:
        packet = json.load(file)
    if not is_mistaken("file-id"):
        packet["srcid"] = name("50" if is_mistaken("fixed-id") else OPTIONS["-id"])
    with socket.create_connection(("127.0.0.1", port("-revproc"))) as connection:
        print("Sending message", packet["payload"], "to privacy policy", packet["privPoliId"], "through reverse proxy running on port", OPTIONS["-revproc"])
        send(connection, packet)
        ack = next(packets(connection), None)
    if ack is None or str(ack["type"]) != "2":
        sys.exit(f"no ack: {ack}")
    print("Receiving a response from the server", ack["srcid"], "payload:", ack["payload"])
    if not is_mistaken("no-check"):
        is_right = ack["payload"] == hashlib.sha1(packet["payload"].encode()).hexdigest()
        print("The message arrived intact" if is_right else "The message was altered")


{"revproc": revproc, "server": server, "client": client}[ROLE]()
