"""A worker behind the proxy on a port, with Python's own library only: python3 worker.py 2100"""
import codecs, hashlib, json, os, socket, socketserver, sys, threading, time

POLICY, ID = "upper", "worker-%d" % os.getpid()
LEASE = 3  # Seconds: who has not renewed it by then is out.
JSON = json.JSONDecoder(parse_int=lambda digits: int(digits[:300]))  # No id has more.

def work(payload):  # Returns the result, a string. An exception is what the client is told instead.
    return payload.upper()

def packets(connection):  # Yields its JSON objects: they come in any pieces, one after another.
    text, utf8 = "", codecs.getincrementaldecoder("utf-8")()
    while received := connection.recv(1 << 16):
        text, end = text + utf8.decode(received), 0
        while text := text[end:].lstrip():
            try:
                packet, end = JSON.raw_decode(text)
            except ValueError:
                break  # The rest of it has not come yet.
            yield packet

class Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    def handle(self):  # In a thread for each connection: answers go back in order.
        try:
            for message in packets(self.connection):
                client, payload = message["srcid"], message["payload"]
                try:
                    result, sha1 = work(payload), hashlib.sha1(payload.encode()).hexdigest()
                    answer = {"type": 2, "srcid": ID, "payload": sha1, "result": result}
                except Exception as error:
                    answer = {"type": 3, "srcid": 0, "payload": str(error), "code": "failed"}
                answer.update(destid=client, payloadsize=len(answer["payload"].encode()))
                self.wfile.write(json.dumps(answer).encode() + b"\n")
        except RecursionError:  # In packets. Where the next one begins is not known: the end.
            answer = dict(type=3, srcid=0, destid=0, payload="nested too deep", code="bad-packet")
            self.wfile.write(json.dumps(answer).encode() + b"\n")

def register(proxy_port, listen_port):  # And renew it until the connection ends, and it with it.
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

server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
server.daemon_threads = True
server.socket.listen(1024)  # Before it registers. The usual queue is of 5 connections.
threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    try:
        register(int(sys.argv[1]), server.server_address[1])
    except OSError as error:
        print("no proxy, trying again:", error, flush=True)
    time.sleep(LEASE / 3)
