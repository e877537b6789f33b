"""A worker behind the proxy on a port, with Python's own library only: python3 worker.py 2100"""
import codecs, hashlib, json, os, socket, socketserver, sys, threading, time

POLICY = "upper"
ID = "worker-%d" % os.getpid()
LEASE = 3  # Seconds: who has not renewed it by then is out.

def work(payload):  # Returns the result, a string. An exception is what the client is told instead.
    return payload.upper()

def packets(connection):
    """Yields the JSON objects of a connection: they come in any pieces, one after another."""
    text, utf8 = "", codecs.getincrementaldecoder("utf-8")()
    while received := connection.recv(1 << 16):
        text += utf8.decode(received)
        while text := text.lstrip():
            try:
                packet, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break  # The rest of it has not come yet.
            text = text[end:]
            yield packet

class Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self):  # In a thread for each connection: answers go back in order.
        for message in packets(self.connection):
            try:
                result, sha1 = work(message["payload"]), hashlib.sha1(message["payload"].encode())
                answer = {"type": 2, "srcid": ID, "payload": sha1.hexdigest(), "result": result}
            except Exception as error:
                answer = {"type": 3, "srcid": 0, "payload": str(error), "code": "failed"}
            answer.update(destid=message["srcid"], payloadsize=len(answer["payload"].encode()))
            self.wfile.write(json.dumps(answer).encode() + b"\n")

class Server(socketserver.ThreadingTCPServer):
    daemon_threads, request_queue_size = True, 1024

def register(proxy_port, listen_port):
    """Registers, and renews that until the connection ends: the registration ends with it."""
    setup = {"type": 1, "id": ID, "privPolyId": POLICY, "listenport": listen_port, "lease": LEASE}
    with socket.create_connection(("127.0.0.1", proxy_port), timeout=LEASE) as proxy:
        proxy.sendall(json.dumps(setup).encode())
        for count, answer in enumerate(packets(proxy)):
            if answer["type"] == 3:
                sys.exit("the proxy refused: " + answer["payload"])
            if count == 0:
                print("registered for", POLICY, flush=True)
            time.sleep(LEASE / 3)
            proxy.sendall(json.dumps(setup).encode())

server = Server(("127.0.0.1", 0), Connection)  # It listens before it registers.
threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    try:
        register(int(sys.argv[1]), server.server_address[1])
    except OSError as error:
        print("no proxy, trying again:", error, flush=True)
    time.sleep(LEASE / 3)
