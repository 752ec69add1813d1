// The adapter to look at: Socket.IO servers A and B on two ports, a broker between them, and a chat page (demo.html) on both.
// PORT is server A's port (3001), B takes the next one; HOST is the address that both listen on (127.0.0.1).
import { createServer, type Server as HttpServer } from "node:http";
import type { AddressInfo } from "node:net";
import { connect } from "amqplib";
import { Server } from "socket.io";
import { createAdapter, type AdapterStats, type AmqpAdapter } from "../index.ts";
import { startBroker } from "./broker.ts";

interface Person {
  name: string;
  room: string;
  server: string;
}
interface Message extends Person {
  text: string;
  image: Buffer | undefined;
  at: number; // ms since the epoch
}
interface ClientToServer {
  enter: (name: unknown, room: unknown, done: () => void) => void;
  say: (text: unknown, image: unknown, done: (seenBy: string[], late: boolean) => void) => void;
  typing: () => void;
  broker: () => void;
}
interface ServerToClient {
  hello: (server: string, ports: Record<string, number>, limits: typeof LIMITS) => void;
  people: (people: Person[]) => void;
  said: (message: Message) => void;
  seen: (seen: (by: string) => void) => void; // asks who has seen the message before
  note: (text: string) => void;
  typing: (name: string) => void;
  status: (stats: AdapterStats, brokerButton: string, at: number) => void; // at: ms since the epoch, by the server's clock
}
interface ServerToServer {
  moved: () => void; // somebody came, went, or changed name or room
}

const { HOST = "127.0.0.1", PORT = "3001" } = process.env;
const JOURNAL = 60_000; // ms; what is said while the broker is away for longer is dropped
const LIMITS = { journal: JOURNAL, seen: JOURNAL + 5_000 }; // ms; who has seen a message is asked for as long
const STATUS_INTERVAL = 500; // ms

if (!/^\d+$/.test(PORT) || Number(PORT) > 65_534) {
  console.error(`PORT has to be a number from 0 (any free port) to 65534, not ${PORT}`);
  process.exit(1);
}
const page = await Bun.file(new URL("demo.html", import.meta.url)).text();
console.log("Starting a broker …");
const broker = await startBroker({ name: "demo" });
// What the next press does, with "…" while it is being done; none for a broker that may serve others too.
let brokerButton = process.env.AMQP_URL ? "" : "Stop the broker";

// One result for both servers, as in a process that runs several; two processes would each create their own.
const adapter = createAdapter({
  amqpConnection: () => connect(broker.url),
  prefix: "socket.io-demo",
  journal: { ms: JOURNAL },
});
const sites = { A: await listen(Number(PORT)), B: await listen(Number(PORT) && Number(PORT) + 1) };
const ports = Object.fromEntries(
  Object.entries(sites).map(([server, http]) => [server, (http.address() as AddressInfo).port]),
);
const chats = Object.entries(sites).map(([server, http]) => serveChat(server, http));
await Promise.all(chats.map(({ ready }) => ready));

// The listeners stay: `bun run` passes a Ctrl-C on that has reached this process already.
const ended = new Promise((resolve) => process.on("SIGINT", resolve).on("SIGTERM", resolve));
// An address that stands for all of this machine's is none to open.
const host = ["0.0.0.0", "::", ""].includes(HOST) ? "localhost" : HOST.includes(":") ? `[${HOST}]` : HOST;
const urls = Object.entries(ports).map(([server, port]) => `  server ${server}   http://${host}:${port}`);
console.log(["Open both, each in a tab of its own:", "", ...urls, "", "Ctrl-C ends it."].join("\n"));
await ended;
console.log("\nClosing …");
await Promise.all(chats.map((chat) => chat.close()));
await broker.close(); // now nothing keeps the process, and it ends by itself

/** A web server with the page, on `port`, or on a free one where that is taken. */
function listen(port: number): Promise<HttpServer> {
  const http = createServer(({ url }, response) => {
    const found = url === "/";
    response
      .writeHead(found ? 200 : 404, { "content-type": "text/html; charset=utf-8" })
      .end(found ? page : "Not found");
  });
  return new Promise((resolve, reject) => {
    http.once("listening", () => resolve(http));
    http.once("error", (error: NodeJS.ErrnoException) =>
      error.code === "EADDRINUSE" && port ? resolve(listen(0)) : reject(error),
    );
    http.listen(port, HOST);
  });
}

async function pressBrokerButton(): Promise<void> {
  const before = brokerButton;
  try {
    if (before === "Stop the broker") {
      brokerButton = "Stopping …";
      await broker.stop();
      brokerButton = "Start the broker";
    } else if (before === "Start the broker") {
      brokerButton = "Starting …";
      await broker.start();
      brokerButton = "Stop the broker";
    }
  } catch (error) {
    brokerButton = before;
    console.warn(error);
  }
}

function serveChat(server: string, http: HttpServer): { ready: Promise<void>; close: () => Promise<void> } {
  const io = new Server<ClientToServer, ServerToClient, ServerToServer, Person>(http, {
    adapter,
    connectionStateRecovery: {},
    maxHttpBufferSize: 4e6,
  });
  const amqp = io.of("/").adapter as AmqpAdapter;
  let people: Person[] = [];
  let lookups = 0;
  let membership = "";
  const told = new Set<string>(); // of the errors since the last connection, so that each attempt is not a line

  /** Asks the cluster who is where. While the broker is away, the people of the other server stay as last seen. */
  async function lookUpPeople(): Promise<void> {
    const lookup = ++lookups;
    const { connected } = amqp.stats;
    const here = () => io.local.fetchSockets();
    const sockets = await (connected ? io.fetchSockets().catch(here) : here());
    if (lookup !== lookups) return; // a later one is under way
    const elsewhere = connected ? [] : people.filter((person) => person.server !== server);
    people = [...sockets.map(({ data }) => data), ...elsewhere].filter(({ room }) => room);
    io.local.emit("people", people);
  }

  function moved(): Promise<void> {
    io.serverSideEmit("moved");
    return lookUpPeople();
  }

  async function showStatus(): Promise<void> {
    const { stats } = amqp;
    io.local.volatile.emit("status", stats, brokerButton, Date.now());
    const now = `${stats.connected} ${await amqp.serverCount()}`;
    if (now !== membership) await lookUpPeople();
    if (stats.connected) told.clear();
    membership = now;
  }

  io.on("moved", lookUpPeople);
  io.on("connection", (socket) => {
    // One that is recovered is in its room, under its name.
    const me: Person = Object.assign(socket.data, socket.recovered ? { server } : { name: "", room: "", server });
    socket.emit("hello", server, ports, LIMITS);

    socket.on("enter", async (name, room, done) => {
      const { room: left } = me;
      Object.assign(me, { name: clip(name, 24) || "nobody", room: clip(room, 40) || "lobby" });
      if (me.room !== left) {
        if (left) await socket.leave(left);
        if (left) socket.to(left).emit("note", `${me.name} went to #${me.room}`);
        await socket.join(me.room); // what is said in the room from here on, anywhere, arrives
        socket.to(me.room).emit("note", `${me.name} joined on server ${server}`);
      }
      done();
      await moved();
    });

    socket.on("say", (text, image, done) => {
      const picture = Buffer.isBuffer(image) ? image : undefined;
      const message = { ...me, text: clip(text, 2000), image: picture, at: Date.now() };
      // Two packets: one that wants an answer is not given to clients that were away.
      socket.to(me.room).emit("said", message);
      socket
        .to(me.room)
        .timeout(LIMITS.seen)
        .emit("seen", (late, seenBy) => done(seenBy, !!late));
    });

    socket.on("typing", () => void socket.to(me.room).volatile.emit("typing", me.name));
    socket.on("broker", pressBrokerButton);
    if (socket.recovered) void moved();
    socket.on("disconnect", () => {
      if (me.room) io.to(me.room).emit("note", `${me.name} left`);
      return moved();
    });
  });

  amqp.on("error", ({ message }: Error) => {
    if (!told.has(message)) console.warn(`server ${server}: ${message}`);
    told.add(message);
  });
  const timer = setInterval(showStatus, STATUS_INTERVAL);
  const close = () => {
    clearInterval(timer);
    return io.close();
  };
  return { ready: amqp.ready, close };
}

function clip(text: unknown, length: number): string {
  return typeof text === "string" ? text.trim().slice(0, length) : "";
}
