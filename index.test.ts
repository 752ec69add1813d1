/**
 * `bun test`: a live broker, three servers or more in this process, real clients. Each test has a prefix of its own, so that tests do not
 * meet; what must not arrive is shown by a later packet on the same way, for order holds.
 */
import { Server as BunEngine } from "@socket.io/bun-engine";
import { connect, type Channel, type ChannelModel, type Options as Amqp, type RecoveringChannelModel } from "amqplib";
import { heapStats } from "bun:jsc";
import { afterAll, afterEach, beforeEach, describe, expect, spyOn, test } from "bun:test";
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { setInterval } from "node:timers/promises";
import { inspect } from "node:util";
import { Server, type RemoteSocket, type ServerOptions, type Socket } from "socket.io";
import { Manager, type ManagerOptions, type Socket as ClientSocket } from "socket.io-client";
import * as msgpack from "socket.io-msgpack-parser";
import { startBroker } from "./dev/broker";
import { Proxy } from "./dev/proxy";
import {
  AmqpAdapter,
  createAdapter,
  createEmitter,
  PeerStream,
  predecessorsOf,
  Publisher,
  readFrame,
  readSections,
  Routes,
  takePackets,
  type AdapterOptions,
  type Emitter,
  type EmitterOptions,
  type Namespace,
} from "./index";

const RUN = `test-${process.pid}`;
// Not in beforeAll(): a test that times out would take a process that was started there down with it.
const broker = await startBroker();
/** See `roomExchanges`: where rooms have exchanges by default, and where they are refused. */
const version = await (async () => {
  const connection = await connect(broker.url);
  const { version } = connection.connection.serverProperties;
  await connection.close();
  return version;
})();
const haveRoomExchanges = Bun.semver.order(version, "4.0.0") < 0;
/** Where a message for several rooms costs the broker a look at each binding. */
const scansBindings = Bun.semver.order(version, "3.11.0") < 0;
const refuseRoomExchanges = Bun.semver.order(version, "4.2.0") >= 0;
let prefix: string;
let tests = 0;
const closers: (() => unknown)[] = [];
const errors = new Map<AmqpAdapter, Error[]>();

afterAll(() => broker.close());

beforeEach(() => {
  prefix = `${RUN}-${++tests}`;
});
afterEach(async () => {
  await Promise.all(closers.splice(0).map((close) => close()));
  const unexpected = [...errors.values()].flat();
  for (const reported of errors.values()) reported.length = 0;
  expect(unexpected).toEqual([]);
}, 5_000); // a close that takes longer waits for what never comes

/** A Socket.IO server on a port of its own. */
interface Host {
  io: Server;
  port: number;
}
type HostOptions = Partial<ServerOptions> & { engine?: "http" | "bun" };

async function host({ engine = "http", ...options }: HostOptions = {}): Promise<Host> {
  if (engine === "bun") {
    const io = new Server(options);
    const bun = new BunEngine({ path: "/socket.io/" });
    io.bind(bun);
    const http = Bun.serve({ port: 0, hostname: "127.0.0.1", ...bun.handler() });
    closers.push(async () => [await io.close(), await http.stop(true)]);
    return { io, port: http.port ?? 0 };
  }
  const http = createServer();
  const io = new Server(http, { serveClient: false, ...options });
  http.listen(0, "127.0.0.1");
  await once(http, "listening");
  closers.push(() => io.close());
  return { io, port: (http.address() as AddressInfo).port };
}

/** A host with the adapter. */
interface Node extends Host {
  adapter: AmqpAdapter;
}
type Options = Partial<AdapterOptions>;
const amqpConnection = () => connect(broker.url);
/** Opens connections on which a key is bound 300 ms late; `begun` is called when it should be. */
const bindingLate = (late: string, begun?: () => void) => async () => {
  const connection = await connect(broker.url);
  const { createChannel } = connection;
  connection.createChannel = async (options) => {
    const channel = await createChannel.call(connection, options);
    for (const bind of ["bindQueue", "bindExchange"] as const) {
      const method = channel[bind];
      channel[bind] = async (to: string, from: string, key: string, args?: unknown) => {
        if (key === late) {
          begun?.();
          await Bun.sleep(300);
        }
        return method.call(channel, to, from, key, args);
      };
    }
    return channel;
  };
  return connection;
};
/** A message on its way to the broker. */
interface Passing {
  key: string;
  content: Buffer;
  /** Whether it is a frame that its receiver has asked for again. */
  again: boolean;
  send: () => void;
  /** The broker gets it, and its confirm gets lost. */
  sendUnconfirmed: () => void;
  /** As the broker would. */
  confirm: () => void;
}

type Pass = (message: Passing) => void;
const unchanged: Pass = ({ send }) => send();

/** Opens connections whose published messages go through `pass`. */
const tampered =
  (pass: Pass, port = broker.port) =>
  async () => {
    const connection = await connect(`amqp://guest:guest@127.0.0.1:${port}?heartbeat=2`);
    const { createConfirmChannel } = connection;
    connection.createConfirmChannel = async (options) => {
      const channel = await createConfirmChannel.call(connection, options);
      const publish = channel.publish.bind(channel);
      channel.publish = (exchange, key, content, options, confirmed) => {
        pass({
          key,
          content,
          again: options?.type === "again",
          send: () => void publish(exchange, key, content, options, confirmed),
          sendUnconfirmed: () => void publish(exchange, key, content, options, () => {}),
          confirm: () => confirmed?.(null, {}),
        });
        return true;
      };
      return channel;
    };
    return connection;
  };

/** The broker's URL, which may be one without a user, with other parts. */
const urlWith = (parts: Partial<URL>): string => Object.assign(new URL(broker.url), parts).href;

/** A server whose adapter may still be on its way to the broker. A test that expects errors takes them with `errorsOf()`. */
async function start(options: Options = {}, server?: HostOptions): Promise<Node> {
  const { io, port } = await host(server);
  io.adapter(createAdapter({ amqpConnection, prefix, ...options }));
  const adapter = adapterOf(io);
  errors.set(adapter, []);
  adapter.on("error", (error: Error) => errors.get(adapter)?.push(error));
  return { io, port, adapter };
}

function adapterOf(io: Server, nsp = "/"): AmqpAdapter {
  const { adapter } = io.of(nsp);
  if (!(adapter instanceof AmqpAdapter)) throw new Error(`${nsp} has another adapter`);
  return adapter;
}

/** What this server's adapter has reported until now. */
const errorsOf = ({ adapter }: Node): string[] => errors.get(adapter)?.splice(0).map(String) ?? [];

/** Three servers that know each other. */
async function cluster(options?: Options, server?: HostOptions): Promise<[Node, Node, Node]> {
  const nodes = await Promise.all([start(options, server), start(options, server), start(options, server)]);
  await acquainted(nodes);
  return nodes;
}

async function acquainted(nodes: Node[], count = nodes.length): Promise<void> {
  await Promise.all(nodes.map(({ adapter }) => adapter.ready));
  await eventually(async () => {
    for (const { adapter } of nodes) expect(await adapter.serverCount()).toBe(count);
  });
}

type ClientOptions = Partial<ManagerOptions>;

/** A client and its socket on the server, and each event that it heard. */
interface Member {
  client: ClientSocket;
  socket: Socket;
  heard: unknown[][];
}
type People = Record<string, Member>;

async function join({ io, port }: Host, rooms: string[] = [], nsp = "/", options: ClientOptions = {}): Promise<Member> {
  io.of(nsp);
  const url = `http://127.0.0.1:${port}`;
  const manager = new Manager(url, { transports: ["websocket"], reconnection: false, ...options });
  const client = manager.socket(nsp, { auth: { token: "secret" } });
  closers.unshift(() => client.disconnect());
  const heard: unknown[][] = [];
  client.onAny((...event: unknown[]) => heard.push(event.filter((part) => typeof part !== "function")));
  await received(client, "connect");
  const socket = io.of(nsp).sockets.get(client.id ?? "");
  if (!socket) throw new Error(`no socket ${client.id} in ${nsp}`);
  await socket.join(rooms);
  return { client, socket, heard };
}

const received = (client: ClientSocket, event: string): Promise<unknown[]> =>
  new Promise((resolve) => client.once(event, (...args: unknown[]) => resolve(args)));

/** Ann is in red on the first server, Bob in red and blue on the second, Cat in blue on the third. */
async function crew(options?: Options, server?: HostOptions, client?: ClientOptions) {
  const nodes = await cluster(options, server);
  const [a, b, c] = nodes;
  const [ann, bob, cat] = await Promise.all([
    join(a, ["red"], "/", client),
    join(b, ["red", "blue"], "/", client),
    join(c, ["blue"], "/", client),
  ]);
  const people = { ann, bob, cat };
  introduce(people);
  return { nodes, a, b, c, ...people, people };
}

/** For a table whose rows leave nothing behind: opens once, and closes after all tests. */
function shared<T>(open: () => Promise<T>): () => Promise<T> {
  let opened: Promise<T> | undefined;
  const own: (() => unknown)[] = [];
  afterAll(() => Promise.all(own.map((close) => close())));
  return () =>
    (opened ??= (async () => {
      const before = closers.splice(0);
      const value = await open();
      own.push(...closers.splice(0));
      closers.push(...before);
      return value;
    })());
}

/** Has each client tell its name when asked. */
function introduce(people: People): void {
  for (const [name, { client }] of Object.entries(people))
    client.on("name?", (answer: (name: string) => void) => answer(name));
}

/** A server, a namespace, a set of rooms, an emitter. */
interface Emitting {
  emit(event: string, ...args: unknown[]): unknown;
}

/** What each of `people` has heard by the time that a last packet of `sender` reaches them. */
async function heardFrom(sender: Emitting, people: People): Promise<Record<string, unknown[][]>> {
  const ends = Object.values(people).map(({ client }) => received(client, "end"));
  sender.emit("end");
  await Promise.all(ends);
  const heard = ({ heard }: Member) => heard.splice(0).filter(([event]) => event !== "end" && event !== "name?");
  return Object.fromEntries(Object.entries(people).map(([name, member]) => [name, heard(member)]));
}

/** The same for one event that only some hear, by their names: `only("ann cat", people, ["hello"])`. */
const only = (names: string, people: People, event: unknown[]) =>
  Object.fromEntries(Object.keys(people).map((name) => [name, names.split(" ").includes(name) ? [event] : []]));

/** Repeats a check until it holds: for what no event tells, on the broker or on another server. */
async function eventually(check: () => unknown, within = 2_000): Promise<void> {
  for (const end = performance.now() + within; ; await Bun.sleep(10)) {
    try {
      return void (await check());
    } catch (error) {
      if (performance.now() > end) throw error;
    }
  }
}

/** Each server reaches the clients of all three. */
const reunited = (nodes: Node[], rooms = ["red", "blue"]) =>
  eventually(async () => {
    for (const { io } of nodes) {
      const names: unknown[] = await io.to(rooms).timeout(200).emitWithAck("name?");
      expect(names.toSorted()).toEqual(["ann", "bob", "cat"]);
    }
  });

/** Publishes as any AMQP client could, and waits for the broker's confirm. */
async function publish(exchange: string, key: string, body: string | Buffer, properties?: Amqp.Publish): Promise<void> {
  const connection = await connect(broker.url);
  const channel = await connection.createConfirmChannel();
  channel.publish(exchange, key, Buffer.from(body), properties);
  await channel.waitForConfirms();
  await connection.close();
}
/** A message about the cluster itself: see dev/protocol.md. */
function control(sender: string, json: string): Buffer {
  const frame = Buffer.alloc(32 + json.length);
  frame.set([2, 2]);
  frame.write(sender, 2, "latin1");
  frame.write(json, 32);
  return frame;
}

/** As the operator can, of all clients. */
const closeConnections = () =>
  broker.evaluate(
    '[rabbit_networking:close_connection(Pid, "maintenance") || Pid <- rabbit_networking:connections()] =/= []',
  );

const JSON_TYPE = { contentType: "application/json" };

/** Exchanges of this test beyond the two that stay, its queues, and the bindings of its queues and of rooms' exchanges. */
const exchanges = async () => (await broker.exchanges(`${prefix}#`)).filter((name) => name !== `${prefix}#keys`);
const queues = () => broker.queues(`${prefix}#`);
const bindings = async () =>
  (await broker.bindings(prefix)).filter(({ destination }) => destination !== `${prefix}#keys`);
/** Every server has bound what its rooms want, and takes no longer everything. */
const settled = () =>
  eventually(async () => expect((await bindings()).filter(({ source }) => source === prefix)).toEqual([]));

/** A process of its own; `source` may use what it imports here. */
function child(source: string) {
  const program = `
    import { Server } from "socket.io";
    import { connect } from "amqplib";
    import { createAdapter, createEmitter } from "./index.ts";
    const prefix = ${JSON.stringify(prefix)};
    const amqpConnection = () => connect(${JSON.stringify(broker.url)});
    ${source}`;
  const child = Bun.spawn([process.execPath, "-e", program], { cwd: import.meta.dir, stdout: "pipe", stderr: "pipe" });
  closers.push(() => (child.kill("SIGKILL"), child.exited));
  return child;
}
const A_SERVER = `
  const io = new Server(0, { serveClient: false, adapter: createAdapter({ amqpConnection, prefix }) });
  await io.of("/").adapter.ready;`;

async function milliseconds(action: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await action();
  return performance.now() - start;
}

describe("a broadcast to", () => {
  const sharedCrew = shared(crew);
  test.each<[what: string, hearers: string, target: (io: Server, ann: Member, cat: Member) => Emitting]>([
    ["everyone", "ann bob cat", (io) => io],
    ["a room", "ann bob", (io) => io.to("red")],
    ["a room of other servers", "bob cat", (io) => io.to("blue")],
    ["a room that nobody is in", "", (io) => io.to("green")],
    ["two rooms reaches who is in both once", "ann bob cat", (io) => io.to("red").to("blue")],
    ["an array of rooms", "ann bob cat", (io) => io.in(["red", "blue", "green"])],
    ["all but a room", "cat", (io) => io.except("red")],
    ["all but several rooms", "", (io) => io.except(["red", "blue"])],
    ["a room but for another", "cat", (io) => io.to("blue").except("red")],
    ["this server alone", "ann", (io) => io.local],
    ["a room, on this server alone", "ann", (io) => io.local.to(["red", "blue"])],
    ["everyone, volatile", "ann bob cat", (io) => io.volatile],
    ["everyone, uncompressed", "ann bob cat", (io) => io.compress(false)],
    ["a socket by its id", "cat", (io, _, cat) => io.to(cat.socket.id)],
    ["a socket by its id and its room, once", "bob cat", (io, _, cat) => io.to([cat.socket.id, "blue"])],
    ["all but a socket", "ann bob", (io, _, cat) => io.except(cat.socket.id)],
    ["the others in a socket's room", "bob", (_, ann) => ann.socket.to("red")],
    ["a room that the socket is not in", "bob cat", (_, ann) => ann.socket.to("blue")],
    ["all other sockets", "bob cat", (_, ann) => ann.socket.broadcast],
    ["all other sockets but one", "bob", (_, ann, cat) => ann.socket.broadcast.except(cat.socket.id)],
    ["all other sockets of this server alone", "", (_, ann) => ann.socket.local],
  ])("%s", async (_, hearers, target) => {
    const { a, ann, cat, people } = await sharedCrew();
    target(a.io, ann, cat).emit("hello", 1);
    expect(await heardFrom(a.io, people)).toEqual(only(hearers, people, ["hello", 1]));
  });

  test.each<[what: string, args: unknown[]]>([
    ["no argument", []],
    ["text of all planes", ["héllo \u{1F600} \u0000 \u2028"]],
    ["numbers, booleans and nothing", [0, -1.5, 1e21, NaN, true, false, null, undefined]],
    ["objects", [{ a: [{ b: {} }, []], "": undefined, when: new Date(0) }, JSON.parse('{"__proto__":1}')]],
    ["a Buffer", [Buffer.from("hello")]],
    ["a view of a part of a buffer", [new Uint8Array([0, 1, 2, 3]).subarray(1, 3)]],
    ["an ArrayBuffer", [new Uint8Array([1, 2]).buffer]],
    ["empty binary", [Buffer.alloc(0)]],
    ["binary at any depth", [{ a: [1, { b: [Buffer.from("x"), { c: Buffer.from("y") }] }] }, Buffer.from("z")]],
    ["what looks like a placeholder", [{ _placeholder: true, num: 0 }, "451-"]],
    ["a megabyte of text", ["x".repeat(1e6)]],
    ["a megabyte of binary", [Buffer.alloc(1e6, 7)]],
  ])("other servers arrives as on this one: %s", async (_, args) => {
    const { a, people } = await sharedCrew();
    a.io.emit("hello", ...args);
    const { ann, bob, cat } = await heardFrom(a.io, people);
    expect(ann).toHaveLength(1);
    expect(bob).toEqual(ann ?? []);
    expect(cat).toEqual(ann ?? []);
  });

  test("a namespace stays in it", async () => {
    const [a, b, c] = await cluster();
    for (const { io } of [a, b, c]) io.of("/chat");
    await Promise.all([a, b, c].map(({ io }) => adapterOf(io, "/chat").ready));
    const [ann, bob] = await Promise.all([join(b, ["red"], "/chat"), join(c, ["red"])]);
    a.io.of("/chat").to("red").emit("hello");
    a.io.of("/chat").emit("all");
    expect(await heardFrom(a.io.of("/chat"), { ann })).toEqual({ ann: [["hello"], ["all"]] });
    expect(await heardFrom(a.io, { bob })).toEqual({ bob: [] });
  });

  test("sockets with outgoing listeners shows them the packet", async () => {
    const { a, bob, people } = await crew();
    const outgoing: unknown[][] = [];
    bob.socket.onAnyOutgoing((...event: unknown[]) => outgoing.push(event));
    a.io.to("red").emit("hello", { a: Buffer.from("x") });
    await heardFrom(a.io, people);
    expect(outgoing).toEqual([["hello", { a: Buffer.from("x") }], ["end"]]);
  });

  test("sockets whose outgoing listeners throw reaches all of them, whoever sends it", async () => {
    const { a, b, ann, bob } = await crew();
    const people = { bob, dan: await join(b, ["red"]) };
    introduce(people);
    for (const { socket } of Object.values(people))
      socket.onAnyOutgoing(() => {
        throw new Error("a listener's");
      });
    const emitter = createEmitter({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    emitter.to("red").emit("hello", "emitter");
    expect(await heardFrom(emitter, people)).toEqual(only("bob dan", people, ["hello", "emitter"]));
    a.io.to("red").emit("hello", "server");
    expect(await heardFrom(a.io, people)).toEqual(only("bob dan", people, ["hello", "server"]));
    ann.client.off("name?");
    await a.io.in(ann.socket.id).socketsLeave("red");
    expect((await a.io.to("red").timeout(2_000).emitWithAck("name?")).toSorted()).toEqual(["bob", "dan"]);
    const reported = errorsOf(b);
    expect(reported).not.toEqual([]);
    expect(reported.filter((error) => !error.includes("a listener's"))).toEqual([]);
  });
});

describe("volatile packets", () => {
  test("of several emits reach a client of another server that takes them, though they come together", async () => {
    const { a, cat } = await crew();
    for (let n = 0; n < 20; n++) a.io.to("blue").volatile.emit("n", n);
    a.io.emit("end");
    await received(cat.client, "end");
    expect(cat.heard.slice(0, -1)).toEqual(Array.from({ length: 20 }, (_, n) => ["n", n]));
  });
});

describe("a room named", () => {
  const names: [what: string, room: string | number][] = [
    ["by a number", 42],
    ["by zero", 0],
    ["in unicode", "Zürich 東京 \u{1F600}"],
    ["#", "#"],
    ["*", "*"],
    ["like a pattern", "a.*.#"],
    ["like a room exchange", "#/#room42"],
    ["like a server's key", "@0123456789abcdef"],
    ["with escapes", "%23 %25 %"],
    ["with control characters", "\u0000\r\n"],
    ["like a socket id", "abcdefghij-ABCDEF_12"],
    ["by 300 characters", "x".repeat(300)],
    ["by 200 characters of two bytes", "é".repeat(200)],
    ["__proto__", "__proto__"],
    ["constructor", "constructor"],
    ["by nothing", ""],
    ["by half an emoji", "\ud83d"],
  ];
  const sharedCrew = shared(crew);
  test.each(names)("%s works across servers", async (_, name) => {
    const room = name as string; // Socket.IO's types know strings only, its users pass numbers too
    const { a, c, cat, people } = await sharedCrew();
    await cat.socket.join(room);
    a.io.to(room).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
    a.io.except(room).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("ann bob", people, ["hello"]));
    expect((await a.io.in(room).fetchSockets()).map(({ id }) => id)).toEqual([cat.socket.id]);
    await cat.socket.leave(room);
    a.io.to(room).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("", people, ["hello"]));
    expect(c.adapter.rooms.has(room)).toBe(false);
  });

  test("by half an emoji may be left without one that has the same bytes", async () => {
    const { a, cat } = await crew();
    await cat.socket.join(["\ud800", "\ufffd"]);
    await cat.socket.join("last");
    const bound = async () => (await bindings()).some(({ key }) => key === "/#last");
    await eventually(async () => expect(await bound()).toBe(true));
    await Promise.all(["\ud800", "last"].map((room) => cat.socket.leave(room)));
    await eventually(async () => expect(await bound()).toBe(false));
    const hello = received(cat.client, "hello");
    a.io.to("\ufffd").emit("hello");
    await hello;
  });

  test("by more than 255 bytes never meets another", async () => {
    const { a, bob, cat, people } = await crew();
    const long = "é".repeat(300);
    await bob.socket.join(`${long}1`);
    await cat.socket.join(`${long}2`);
    a.io.to(`${long}2`).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
    const names = await exchanges();
    if (haveRoomExchanges) expect(names).toHaveLength(4); // red, blue and the long ones
    for (const name of names) expect(Buffer.byteLength(name)).toBeLessThanOrEqual(255);
  });

  test("like a part of another namespace's name stays in its own", async () => {
    const [a, b, c] = await cluster();
    const [ann, bob] = await Promise.all([join(b, ["b"], "/a"), join(c, [], "/a#b")]);
    const [one, two] = [a.io.of("/a"), a.io.of("/a#b")];
    await Promise.all([adapterOf(a.io, "/a").ready, adapterOf(a.io, "/a#b").ready]);
    one.to("b").emit("hello");
    two.emit("all");
    expect(await heardFrom(one, { ann })).toEqual({ ann: [["hello"]] });
    expect(await heardFrom(two, { bob })).toEqual({ bob: [["all"]] });
  });
});

describe("order", () => {
  test("one server's packets arrive once and as emitted, whatever their rooms and binary", async () => {
    const { a, bob, people } = await crew();
    const ways = (io: Server): Emitting[] => [
      io,
      io.to("red"),
      io.to("blue"),
      io.to(["red", "blue"]),
      io.to(bob.socket.id),
      io.except("green"),
      io.to("blue").compress(false),
    ];
    const numbers = Array.from({ length: 700 }, (_, i) => i);
    for (const i of numbers) {
      ways(a.io)[i % 7]?.emit("n", i, i % 3 ? "plain" : Buffer.from("binary"));
      if (i % 60 === 0) await Bun.sleep(0); // in bursts
    }
    const { bob: all, cat } = await heardFrom(a.io, people);
    expect(all?.map(([, i]) => i)).toEqual(numbers);
    const some = cat?.map(([, i]) => Number(i)) ?? [];
    expect(some).toEqual(some.toSorted((x, y) => x - y));
  });

  test("holds for each of several senders at once", async () => {
    const { nodes, people } = await crew();
    const numbers = Array.from({ length: 200 }, (_, i) => i);
    for (const i of numbers) {
      for (const { io, port } of nodes) (i % 2 ? io : io.to(["red", "blue"])).emit("n", port, i);
      if (i % 20 === 0) await Bun.sleep(0);
    }
    const ends = nodes.flatMap(({ port }) =>
      Object.values(people).map(({ client }) => received(client, `end ${port}`)),
    );
    for (const { io, port } of nodes) io.emit(`end ${port}`);
    await Promise.all(ends);
    for (const { heard } of Object.values(people))
      for (const { port } of nodes)
        expect(heard.filter(([, sender]) => sender === port).map(([, , i]) => i)).toEqual(numbers);
  });

  test("what disconnect handlers of another namespace emit as the server closes arrives", async () => {
    const { a, people } = await crew();
    const chat = a.io.of("/chat");
    chat.on("connection", (socket) => socket.on("disconnect", () => a.io.to("blue").emit("left", "/chat")));
    await join(a, [], "/chat");
    const { bob, cat } = people;
    const left = [bob, cat].map(({ client }) => received(client, "left"));
    await a.io.close();
    await Promise.all(left);
  });

  test("what is emitted just before the server closes still arrives", async () => {
    const { a, cat } = await crew();
    const last = received(cat.client, "last");
    for (let i = 0; i < 100; i++) a.io.to("blue").emit("n", i);
    a.io.emit("last");
    await a.io.close();
    await last;
    expect(cat.heard).toHaveLength(101);
  });
});

describe("a join", () => {
  test("is live: each emit after it reaches the socket, from every server", async () => {
    const { nodes, cat } = await crew();
    for (let i = 0; i < 30; i++) {
      await cat.socket.join(`room${i}`);
      const all = Promise.all(nodes.map((_, n) => received(cat.client, `${i} ${n}`)));
      nodes.forEach(({ io }, n) => io.to(`room${i}`).emit(`${i} ${n}`));
      await all;
    }
  });

  test("is live too when another join of that room is still under way", async () => {
    const { a, c, cat } = await crew();
    const dan = await join(c);
    const [one, two] = [received(cat.client, "hello"), received(dan.client, "hello")];
    void dan.socket.join("green");
    await cat.socket.join("green");
    a.io.to("green").emit("hello");
    await Promise.all([one, two]);
  });

  test("is live after joins and leaves in one breath", async () => {
    const { a, cat, people } = await crew();
    for (let i = 0; i < 20; i++) {
      void cat.socket.join("green");
      void cat.socket.leave("green");
    }
    await cat.socket.join("green");
    a.io.to("green").emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
    void cat.socket.join("green");
    await cat.socket.leave("green");
    a.io.to("green").emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("", people, ["hello"]));
  });

  test("ends though its room is left before it is bound", async () => {
    const { cat } = await crew();
    const rooms = Array.from({ length: 20 }, (_, i) => `room${i}`);
    const joins = rooms.map((room) => cat.socket.join(room));
    for (const room of rooms) void cat.socket.leave(room);
    await Promise.all(joins);
  });

  test("of many rooms at once binds all, and the end of the socket none", async () => {
    const { a, c, cat } = await crew();
    const rooms = Array.from({ length: 200 }, (_, i) => `room${i}`);
    await cat.socket.join(rooms);
    await eventually(() => expect(c.adapter.stats.rooms).toBe(201));
    const all = Promise.all(rooms.map((room) => received(cat.client, room)));
    for (const room of rooms) a.io.to(room).emit(room);
    await all;
    cat.client.disconnect();
    await eventually(() => expect(c.adapter.stats.rooms).toBe(0));
    await eventually(async () =>
      expect(
        (await bindings())
          .filter(({ key, source }) => key.includes("#") && source === `${prefix}#keys`)
          .map(({ key }) => key)
          .toSorted(),
      ).toEqual(haveRoomExchanges ? ["/#blue", "/#red"] : ["/#blue", "/#red", "/#red"]),
    );
  });

  test("hears nothing of what a busy server has emitted before it, though that is far from the broker", async () => {
    const link = await Proxy.open(broker.port);
    const far = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const [a, b, c] = await Promise.all([start({ amqpConnection: far }), start(), start()]);
    let n = 0;
    let isOver = false;
    closers.push(async () => {
      isOver = true;
      link.latency = 0;
      await a.adapter.close();
      link.close();
    });
    await acquainted([a, b, c]);
    const cat = await join(c, ["red"]);
    link.latency = 20; // so that some frames are unconfirmed all the time
    void (async () => {
      for (; !isOver; await Bun.sleep(1)) a.io.to("red").emit("n", ++n);
    })();
    await eventually(() => expect(cat.heard.length).toBeGreaterThan(500));
    for (let i = 0; i < 3; i++) {
      const bob = await join(b);
      const before = n;
      await bob.socket.join("red");
      await received(bob.client, "n");
      expect(bob.heard[0]?.[1]).toBeGreaterThan(before - 200);
      bob.client.disconnect();
      await eventually(() => expect(b.adapter.stats.rooms).toBe(0));
    }
    expect(b.adapter.stats.replayed).toBe(0);
  });

  test("is live while other servers leave the room", async () => {
    const { nodes, a, people } = await crew();
    const members = Object.values(people);
    for (let i = 0; i < 20; i++) {
      await Promise.all(members.map(({ socket }, n) => (n === i % 3 ? socket.join("green") : socket.leave("green"))));
      const hello = members.filter((_, n) => n === i % 3).map(({ client }) => received(client, `hello ${i}`));
      (nodes[(i + 1) % 3] ?? a).io.to("green").emit(`hello ${i}`);
      await Promise.all(hello);
    }
  });
});

describe("acknowledgements", () => {
  const sharedCrew = shared(crew);
  test.each<[what: string, names: string, target: (io: Server) => Pick<Server, "timeout">]>([
    ["everyone", "ann bob cat", (io) => io],
    ["a room of other servers", "bob cat", (io) => io.to("blue")],
    ["several rooms, once each", "ann bob cat", (io) => io.to(["red", "blue"])],
    ["all but a room", "cat", (io) => io.except("red")],
    ["this server alone", "ann", (io) => io.local],
    ["nobody", "", (io) => io.to("green")],
  ])("come from %s as soon as all are there", async (_, expected, target) => {
    const { a } = await sharedCrew();
    const names: unknown[] = await target(a.io).timeout(2_000).emitWithAck("name?");
    expect(names.toSorted().join(" ")).toBe(expected);
  });

  test("carry binary both ways", async () => {
    const { a, people } = await crew();
    for (const { client } of Object.values(people))
      client.on("echo", (data: unknown, answer: (value: unknown) => void) => answer({ data }));
    const echo = { data: { deep: [Buffer.from("hello")] } };
    expect(await a.io.timeout(2_000).emitWithAck("echo", echo.data)).toEqual([echo, echo, echo]);
  });

  test("that are missing are an error, with those that came", async () => {
    const { a, cat } = await crew();
    cat.client.off("name?");
    const { promise, resolve } = Promise.withResolvers<unknown[]>();
    a.io.timeout(300).emit("name?", (...result: [Error | null, string[]]) => resolve(result));
    const [error, names] = (await promise) as [Error, string[]];
    expect(error).toBeInstanceOf(Error);
    expect(names.toSorted()).toEqual(["ann", "bob"]);
  });

  test("may take the longest time that a timer takes", async () => {
    const { a } = await crew();
    expect(await a.io.timeout(2 ** 31 - 1).emitWithAck("name?")).toHaveLength(3);
  });

  test("and other answers are not waited for from a server where the namespace has just closed", async () => {
    const [a, b] = await cluster(undefined, { cleanupEmptyChildNamespaces: true });
    for (const { io } of [a, b]) io.of(/^\/dynamic-/);
    const [ann, bob] = await Promise.all([join(a, [], "/dynamic-1"), join(b, [], "/dynamic-1")]);
    const { adapter } = a.io.of("/dynamic-1");
    await eventually(async () => expect(await adapter.serverCount()).toBe(2));
    const gone = once(bob.socket, "disconnect");
    bob.client.disconnect();
    await gone;
    expect(await milliseconds(() => a.io.of("/dynamic-1").fetchSockets())).toBeLessThan(1_000);
    expect(ann.socket.connected).toBe(true);
  });

  test("for arguments that cannot be encoded are an error for the caller, and cost no other", async () => {
    const { a, people } = await crew();
    await expect(a.io.timeout(500).emitWithAck("name?", 1n)).rejects.toThrow("BigInt");
    expect(await a.io.timeout(2_000).emitWithAck("name?")).toHaveLength(3);
    const nobody = { ann: [], bob: [], cat: [] };
    expect(await heardFrom(a.io, people)).toEqual(nobody);
    expect(errorsOf(a)).toEqual([expect.stringContaining("A packet cannot be encoded for other servers")]);
  });

  test("come from one remote socket", async () => {
    const { a, cat } = await crew();
    const [remote] = await a.io.in(cat.socket.id).fetchSockets();
    expect(await remote?.timeout(2_000).emitWithAck("name?")).toBe("cat");
  });
});

describe("sockets of other servers", () => {
  const byId = (sockets: { id: string }[]) => new Set(sockets.map(({ id }) => id));

  test("are fetched with their data, rooms and handshake", async () => {
    const { a, cat } = await crew();
    cat.socket.data = { name: "Cat", age: 7, tags: ["x"], face: Buffer.from("=^.^=") };
    const sockets = await a.io.fetchSockets();
    expect(sockets).toHaveLength(3);
    const remote = sockets.find(({ id }) => id === cat.socket.id);
    expect(remote?.data).toEqual(cat.socket.data);
    expect(remote?.rooms).toEqual(cat.socket.rooms);
    const { address, auth, headers, query, url, xdomain, time } = cat.socket.handshake;
    expect(remote?.handshake).toMatchObject({ address, auth, headers, query: { ...query }, url, xdomain, time });
    expect(remote?.handshake.auth).toEqual({ token: "secret" });
  });

  test("are fetched in as many answers as maxPayload takes, without the data that is too much for it", async () => {
    const { b, people, a } = await crew({ maxPayload: 20_000 });
    const crowd = await Promise.all(Array.from({ length: 20 }, () => join(b, ["green"])));
    for (const { socket } of crowd) socket.data = { text: "x".repeat(3_000) };
    people.bob.socket.data = { text: "x".repeat(30_000) };
    const sockets = await a.io.in("green").fetchSockets();
    expect(sockets.map(({ data }) => data)).toEqual(crowd.map(({ socket }) => socket.data));
    expect((await a.io.in("blue").fetchSockets()).map(({ data }) => data)).toEqual([{}, {}]);
    expect(errorsOf(b)).toEqual([expect.stringContaining("data.text cannot be sent to another server")]);
  });

  test("are fetched by room, without a room, and not with local", async () => {
    const { a, ann, bob, cat } = await crew();
    expect(byId(await a.io.in("blue").fetchSockets())).toEqual(byId([bob.socket, cat.socket]));
    expect(byId(await a.io.in(["red", "blue"]).except("blue").fetchSockets())).toEqual(byId([ann.socket]));
    expect(byId(await a.io.local.fetchSockets())).toEqual(byId([ann.socket]));
    expect(await a.io.in("green").fetchSockets()).toEqual([]);
  });

  test("join and leave rooms, in order with a fetch", async () => {
    const { a, bob, cat, people } = await crew();
    a.io.in("blue").socketsJoin(["green", "yellow"]);
    expect(byId(await a.io.in("green").fetchSockets())).toEqual(byId([bob.socket, cat.socket]));
    a.io.in("red").socketsLeave("green");
    expect(byId(await a.io.in("green").fetchSockets())).toEqual(byId([cat.socket]));
    await cat.socket.join("green"); // resolves when the room is bound
    a.io.to("green").emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
  });

  test("hear what is emitted right after they were made to join, also to rooms that were named together before", async () => {
    const [a, b] = await Promise.all([start(), start({ amqpConnection: bindingLate("/#green") })]);
    await acquainted([a, b]);
    const bob = await join(b, ["blue"]);
    await settled();
    a.io.to(["green", "red"]).emit("before");
    a.io.in("blue").socketsJoin("green");
    a.io.to(["green", "red"]).emit("after");
    expect(await heardFrom(a.io, { bob })).toEqual({ bob: [["after"]] });
  });

  test("join, leave, hear and disconnect one by one", async () => {
    const { a, cat, people } = await crew();
    const remote = async (): Promise<RemoteSocket<Record<string, never>, unknown> | undefined> =>
      (await a.io.in(cat.socket.id).fetchSockets())[0];
    (await remote())?.join("green");
    (await remote())?.leave("blue");
    expect([...((await remote())?.rooms ?? [])].toSorted()).toEqual([cat.socket.id, "green"].toSorted());
    a.io.to(cat.socket.id).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
    const gone = received(cat.client, "disconnect");
    (await remote())?.disconnect(true);
    expect(await gone).toContain("io server disconnect");
  });

  test("disconnect by room, after the packet that was sent just before", async () => {
    const { a, ann, bob, cat } = await crew();
    const gone = [bob, cat].map(({ client }) => received(client, "disconnect"));
    a.io.to("blue").emit("bye");
    a.io.in("blue").disconnectSockets();
    await Promise.all(gone);
    expect([bob.heard, cat.heard]).toEqual([[["bye"]], [["bye"]]]);
    expect(ann.client.connected).toBe(true);
    expect(byId(await a.io.fetchSockets())).toEqual(byId([ann.socket]));
  });

  test("disconnect with their connections when asked to", async () => {
    const { a, cat } = await crew();
    const closed = new Promise((resolve) => cat.client.io.on("close", resolve));
    a.io.in(cat.socket.id).disconnectSockets(true);
    await closed;
  });
});

describe("servers", () => {
  test("emit to each other, not to themselves, per namespace", async () => {
    const nodes = await cluster();
    const [a, b, c] = nodes;
    for (const { io } of nodes) io.of("/chat");
    await Promise.all(nodes.map(({ io }) => adapterOf(io, "/chat").ready));
    const logs = nodes.map(({ io }) => {
      const log: unknown[][] = [];
      io.on("hello", (...args: unknown[]) => log.push(["/", ...args]));
      io.of("/chat").on("hello", (...args: unknown[]) => log.push(["/chat", ...args]));
      return log;
    });
    const ended = Promise.all([b, c].map(({ io }) => once(io.of("/chat"), "end")));
    const args = [{ a: 1 }, [Buffer.from("x")], null];
    a.io.serverSideEmit("hello", ...args);
    a.io.of("/chat").serverSideEmit("hello");
    a.io.of("/chat").serverSideEmit("end");
    await ended;
    expect(logs).toEqual([[], ...Array(2).fill([["/", ...args], ["/chat"]])]);
  });

  test("answer each other", async () => {
    const [a, b, c] = await cluster();
    a.io.on("sum", () => expect.unreachable());
    b.io.on("sum", (x: number, y: number, answer: (sum: unknown) => void) => answer(x + y));
    c.io.on("sum", (x: number, y: number, answer: (sum: unknown) => void) => {
      answer({ sum: x + y });
      answer("once only");
    });
    const answers: unknown[] = await a.io.serverSideEmitWithAck("sum", 1, 2);
    expect(answers).toHaveLength(2);
    expect(answers).toContainEqual(3);
    expect(answers).toContainEqual({ sum: 3 });
  });

  test("with a listener that throws lose nothing else, and say so", async () => {
    const [a, b] = await cluster();
    const taken: number[] = [];
    b.io.on("n", (n: number) => {
      if (n === 3) throw new Error("a listener's");
      taken.push(n);
    });
    const last = once(b.io, "last");
    for (const n of [1, 2, 3, 4, 5]) a.io.serverSideEmit("n", n);
    a.io.serverSideEmit("last");
    await last;
    expect(taken).toEqual([1, 2, 4, 5]);
    expect(errorsOf(b)).toEqual([expect.stringContaining("a listener's")]);
  });

  test("that do not answer in time are an error, with the answers that came", async () => {
    const [a, b] = await cluster({ requestsTimeout: 200 });
    b.io.on("name?", (answer: (name: string) => void) => answer("b"));
    const { promise, resolve } = Promise.withResolvers<unknown[]>();
    a.io.serverSideEmit("name?", (...result: unknown[]) => resolve(result));
    expect(await promise).toEqual([expect.any(Error), ["b"]]);
  });

  test("alone get no answers, at once", async () => {
    const a = await start();
    await a.adapter.ready;
    expect(await a.io.serverSideEmitWithAck("name?")).toEqual([]);
    expect(await a.io.fetchSockets()).toEqual([]);
    expect(await a.adapter.serverCount()).toBe(1);
  });

  test("that close are forgotten at once", async () => {
    const { a, b, c } = await crew();
    await c.io.close();
    expect(await milliseconds(() => b.io.fetchSockets())).toBeLessThan(500);
    await acquainted([a, b]);
    expect(await a.io.timeout(2_000).emitWithAck("name?")).toHaveLength(2);
  });

  test("that close several namespaces say nothing behind their goodbye", async () => {
    const a = await start();
    const chat = adapterOf(a.io.of("/chat") && a.io, "/chat");
    const emitter = createEmitter({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    for (let i = 0; i < 4; i++) {
      const b = await start();
      b.io.of("/chat");
      await eventually(async () => expect(await chat.serverCount()).toBe(2));
      await Bun.sleep(50); // announcements are made at least 20 ms apart
      await b.io.close();
      const said = once(a.io, "said");
      emitter.serverSideEmit("said");
      await said;
      expect(await chat.serverCount()).toBe(1);
    }
  });

  test("killed with SIGKILL are not waited for once the broker has dropped their queue", async () => {
    const nodes = await cluster();
    const victim = child(A_SERVER);
    await acquainted(nodes, 4);
    victim.kill("SIGKILL");
    await victim.exited;
    for (const { io, adapter } of nodes) {
      expect(await milliseconds(() => io.fetchSockets())).toBeLessThan(500);
      expect(await adapter.serverCount()).toBe(3);
    }
  }, 15_000);

  test("with other heartbeats know each other all the time", async () => {
    const [a, b] = await Promise.all([start({ heartbeatInterval: 50, heartbeatTimeout: 400 }), start()]);
    await acquainted([a, b]);
    for (const end = performance.now() + 1_500; performance.now() < end; await Bun.sleep(20))
      expect(await a.adapter.serverCount()).toBe(2);
  });

  test("killed with SIGKILL are not counted once they miss a heartbeat, though nobody asks them", async () => {
    const a = await start({ heartbeatInterval: 200, heartbeatTimeout: 60_000 });
    const victim = child(A_SERVER.replace("prefix }", "prefix, heartbeatInterval: 200 }"));
    await acquainted([a], 2);
    victim.kill("SIGKILL");
    await eventually(async () => expect(await a.adapter.serverCount()).toBe(1), 3_000);
  });

  test("that hang are an error in time, and no longer waited for when they die", async () => {
    const { nodes, a } = await crew({ requestsTimeout: 5_000 });
    for (const { io } of nodes) io.on("name?", (answer: (name: string) => void) => answer("server"));
    const victim = child(A_SERVER);
    await acquainted(nodes, 4);
    victim.kill("SIGSTOP");
    await expect(a.io.timeout(100).fetchSockets()).rejects.toThrow();
    const waiting = Promise.all([
      a.io.fetchSockets(),
      a.io.serverSideEmitWithAck("name?"),
      a.io.timeout(5_000).emitWithAck("name?"),
    ]);
    victim.kill("SIGKILL");
    await victim.exited;
    expect(
      await milliseconds(async () => {
        const [sockets, servers, clients] = await waiting;
        expect([sockets.length, servers.length, clients.length]).toEqual([3, 2, 3]);
      }),
    ).toBeLessThan(500);
  }, 15_000);

  test("that share one createAdapter() result, given to the constructor, are servers of their own", async () => {
    const adapter = createAdapter({ amqpConnection, prefix });
    const hosts = await Promise.all([host({ adapter }), host({ adapter }), host({ adapter })]);
    const nodes = hosts.map(({ io, port }) => ({ io, port, adapter: adapterOf(io) }));
    await acquainted(nodes);
    const members = await Promise.all(nodes.map((node) => join(node, ["red"])));
    const all = Promise.all(members.map(({ client }) => received(client, "hello")));
    nodes[0]?.io.to("red").emit("hello");
    await all;
    expect(await queues()).toHaveLength(3);
    await nodes[2]?.io.close();
    await acquainted(nodes.slice(0, 2));
  });

  test("with different prefixes do not meet", async () => {
    const { a, people } = await crew();
    const other = await start({ prefix: `${prefix}x` });
    await other.adapter.ready;
    const dan = await join(other, ["red"]);
    a.io.to("red").emit("hello");
    other.io.to("red").emit("other");
    expect(await heardFrom(other.io, { dan })).toEqual({ dan: [["other"]] });
    expect(await heardFrom(a.io, people)).toEqual(only("ann bob", people, ["hello"]));
    expect(await other.io.fetchSockets()).toHaveLength(1);
    expect(await other.adapter.serverCount()).toBe(1);
  });

  test("with and without room exchanges work together", async () => {
    const [a, b, c] = await Promise.all([start(), start({ roomExchanges: false }), start({ roomExchanges: false })]);
    await acquainted([a, b, c]);
    const people = { ann: await join(a, ["red"]), bob: await join(b, ["red"]), cat: await join(c, ["blue"]) };
    for (const { io } of [a, b, c]) {
      io.to("red").emit("hello");
      io.to(["red", "blue"]).emit("all");
      const both = [["hello"], ["all"]];
      expect(await heardFrom(io, people)).toEqual({ ann: both, bob: both, cat: [["all"]] });
    }
    await people.ann.socket.leave("red");
    b.io.to("red").emit("hello");
    expect(await heardFrom(b.io, people)).toEqual(only("bob", people, ["hello"]));
  });

  test("miss nothing that others tell each other, though their queue gets everything", async () => {
    const [link, b] = [await Proxy.open(broker.port), await start()];
    const answers: Pass = ({ key, send, sendUnconfirmed }) =>
      key === `@${b.adapter.uid}` ? sendUnconfirmed() : send();
    const a = await start({ amqpConnection: tampered(answers), requestsTimeout: 500 });
    await acquainted([a, b]);
    const c = await start({ amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`) });
    closers.push(async () => {
      link.latency = 0;
      await Promise.all([a, c].map(({ adapter }) => adapter.close()));
      link.close();
      [a, c].forEach(errorsOf);
    });
    await c.adapter.ready;
    link.latency = 50; // its rooms are bound after seconds, and it gets everything until then
    const { client } = await join(
      c,
      Array.from({ length: 40 }, (_, i) => `room${i}`),
    );
    await acquainted([a, b, c]);
    for (let i = 0; i < 3; i++) {
      await b.io.fetchSockets();
      const hello = received(client, "hello");
      a.io.emit("hello");
      await hello;
    }
    expect(c.adapter.stats.rooms).toBeLessThan(40);
    expect(c.adapter.stats.replayed).toBe(0);
  });
});

describe("namespaces", () => {
  test("that match a pattern come with a client, go with it, and come again", async () => {
    const nodes = await cluster(undefined, { cleanupEmptyChildNamespaces: true });
    const [a, b, c] = nodes;
    for (const { io } of nodes) io.of(/^\/dynamic-\d+$/).on("connection", (socket) => socket.join("red"));
    for (let round = 0; round < 3; round++) {
      const [ann, bob] = await Promise.all([join(a, ["red"], "/dynamic-1"), join(b, ["red"], "/dynamic-1")]);
      await Promise.all([adapterOf(a.io, "/dynamic-1").ready, adapterOf(b.io, "/dynamic-1").ready]);
      const hello = received(bob.client, "hello");
      a.io.of("/dynamic-1").to("red").emit("hello");
      await hello;
      expect(await a.io.of("/dynamic-1").fetchSockets()).toHaveLength(2);
      ann.client.disconnect();
      bob.client.disconnect();
      await eventually(async () => expect(JSON.stringify(await bindings())).not.toContain("dynamic"));
    }
    expect(await c.io.fetchSockets()).toEqual([]);
  });

  test("that only some servers have are not waited for by the others", async () => {
    const [a, b] = await cluster();
    const { client } = await join(b, [], "/late");
    client.on("name?", (answer: (name: string) => void) => answer("late"));
    await adapterOf(b.io, "/late").ready;
    const late = a.io.of("/late");
    await adapterOf(a.io, "/late").ready;
    await eventually(async () => expect(await late.fetchSockets()).toHaveLength(1));
    expect(await milliseconds(() => late.fetchSockets())).toBeLessThan(500);
    expect(await late.timeout(2_000).emitWithAck("name?")).toEqual(["late"]);
  });

  test("that close and open again at once are as new", async () => {
    const [a, b] = await cluster(undefined, { cleanupEmptyChildNamespaces: true });
    for (const { io } of [a, b]) io.of(/^\/dynamic-/).on("connection", (socket) => socket.emit("welcome"));
    for (let round = 0; round < 10; round++) {
      const [ann, bob] = await Promise.all([join(a, ["red"], "/dynamic-1"), join(b, ["red"], "/dynamic-1")]);
      await Promise.all([a, b].map(({ io }) => adapterOf(io, "/dynamic-1").ready));
      const hello = Promise.all([ann, bob].flatMap(({ client }) => [received(client, "a"), received(client, "b")]));
      a.io.of("/dynamic-1").to("red").emit("a");
      b.io.of("/dynamic-1").emit("b");
      await hello;
      const gone = [ann, bob].map(({ socket }) => once(socket, "disconnect"));
      ann.client.disconnect();
      bob.client.disconnect();
      await Promise.all(gone);
    }
  });

  test("stay open under a client that is on its way, though another one goes", async () => {
    const link = await Proxy.open(broker.port);
    const node = await start(
      { amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`) },
      { cleanupEmptyChildNamespaces: true },
    );
    closers.push(async () => {
      await node.adapter.close();
      link.close();
    });
    node.io.of(/^\/dynamic-/);
    await node.adapter.ready;
    await settled(); // until then the queue gets everything, and no client is held back
    link.latency = 100; // clients are held back until their namespace is bound
    const [ann, bob] = [0, 1].map(() => {
      const manager = new Manager(`http://127.0.0.1:${node.port}`, { transports: ["websocket"], reconnection: false });
      closers.unshift(() => manager._close());
      return manager.socket("/dynamic-1");
    });
    if (!ann || !bob) throw new Error("two clients");
    const connected = received(bob, "connect");
    const coming = () => node.io._nsps.get("/dynamic-1") as { _preConnectSockets?: Map<string, Socket> } | undefined;
    await eventually(() => expect(coming()?._preConnectSockets?.size).toBe(2));
    ann.io.engine.close();
    await connected;
    expect(node.io.of("/dynamic-1").sockets.has(bob.id ?? "")).toBe(true);
  });

  test("close in time over a link that is dead, though nobody has noticed", async () => {
    const link = await Proxy.open(broker.port);
    const amqpConnection = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const node = await start({ amqpConnection, requestsTimeout: 200 });
    node.io.of("/chat");
    await Promise.all([node.adapter.ready, adapterOf(node.io, "/chat").ready]);
    link.silence();
    expect(await milliseconds(() => node.io.close())).toBeLessThan(4_000);
    link.close();
    errorsOf(node);
  });

  test("close together, with what is being bound and unbound", async () => {
    for (let round = 0; round < 8; round++) {
      const nodes = await cluster();
      for (const { io } of nodes) io.of("/chat");
      await Promise.all(nodes.map(({ io }) => adapterOf(io, "/chat").ready));
      const [ann] = await Promise.all([join(nodes[2], ["red"]), join(nodes[1], ["red"], "/chat")]);
      void ann.socket.join("green");
      await Promise.all(nodes.map(({ io }) => io.close()));
      expect([await exchanges(), await queues()]).toEqual([[], []]);
    }
  });

  test("that close have given their answers before, though these had to wait", async () => {
    let isSlow = false;
    const link = await Proxy.open(broker.port);
    const amqpConnection = tampered(({ send, sendUnconfirmed }) => (isSlow ? sendUnconfirmed() : send()), link.port);
    const server = { cleanupEmptyChildNamespaces: true };
    const [a, b] = await Promise.all([start({}, server), start({ amqpConnection }, server)]);
    await acquainted([a, b]);
    for (const { io } of [a, b]) io.of(/^\/dynamic-/);
    const [ann, bob] = await Promise.all([join(a, [], "/dynamic-1"), join(b, [], "/dynamic-1")]);
    await eventually(async () => expect(await a.io.of("/dynamic-1").adapter.serverCount()).toBe(2));
    introduce({ ann });
    bob.client.on("name?", (answer: (name: string) => void) => {
      answer("bob");
      bob.client.disconnect();
    });
    isSlow = true;
    for (let unconfirmed = 1; unconfirmed <= 8; unconfirmed++) {
      b.io.to("red").emit("hello");
      await eventually(() => expect(b.adapter.stats.unconfirmed).toBe(unconfirmed));
    }
    const names: unknown[] = await a.io.of("/dynamic-1").timeout(2_000).emitWithAck("name?");
    expect(names.toSorted()).toEqual(["ann", "bob"]);
    isSlow = false;
    link.cut(); // what is unconfirmed goes again
    link.heal();
    await b.adapter.close();
    link.close();
    errorsOf(b);
  });
});

describe("rooms and sockets of an adapter", () => {
  /** What a program of joins and leaves does to `rooms`, `sids` and the room events; socket ids by their names. */
  async function life(node: Host): Promise<unknown[]> {
    const { adapter } = node.io.of("/");
    const log: unknown[] = [];
    for (const event of ["create-room", "join-room", "leave-room", "delete-room"])
      adapter.on(event, (...args: unknown[]) => log.push([event, ...args]));
    const [one, two] = [await join(node), await join(node)];
    const steps: (() => unknown)[] = [
      () => one.socket.join("a"),
      () => one.socket.join("a"),
      () => two.socket.join(["a", "b"]),
      () => one.socket.leave("a"),
      () => one.socket.leave("a"),
      () => one.socket.leave("none"),
      () => node.io.in("b").socketsJoin(["c", "d"]),
      () => node.io.in("c").socketsLeave("b"),
      () => adapter.addAll(one.socket.id, new Set(["e"])),
      () => adapter.del("stranger", "e"),
      () => adapter.delAll(one.socket.id),
      () => log.push(adapter.socketRooms(two.socket.id), adapter.socketRooms("stranger")),
      () => node.io.in("d").disconnectSockets(),
    ];
    for (const step of steps) {
      void step();
      log.push({
        rooms: [...adapter.rooms].map(([room, ids]) => [room, [...ids]]),
        sids: [...adapter.sids].map(([id, rooms]) => [id, [...rooms]]),
      });
    }
    const names = new Map([one, two].map(({ socket }, n) => [socket.id, `socket ${n}`]));
    const named = (value: unknown): unknown => {
      if (typeof value === "string") return names.get(value) ?? value;
      if (value instanceof Set || Array.isArray(value)) return [...value].map(named);
      return typeof value === "object" && value
        ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, named(v)]))
        : value;
    };
    return log.map(named);
  }

  test("are those of the in-memory adapter, at every step", async () => {
    const [a, b] = await cluster();
    await join(b, ["a", "b", "c"]); // another server's sockets are no part of it
    expect(await life(a)).toEqual(await life(await host()));
  });
});

describe("clients over", () => {
  test.each([
    ["WebSocket, the HTTP engine", "http", ["websocket"]],
    ["long-polling, the HTTP engine", "http", ["polling"]],
    ["long-polling upgraded to WebSocket, the HTTP engine", "http", ["polling", "websocket"]],
    ["WebSocket, Bun's engine", "bun", ["websocket"]],
    ["long-polling, Bun's engine", "bun", ["polling"]],
  ] as const)("%s, get text and binary in order and answer", async (_, engine, transports) => {
    const { a, people } = await crew(undefined, { engine }, { transports: [...transports] });
    const packets = [
      ["text", "héllo"],
      ["binary", { deep: [Buffer.from("x")] }],
      ["text", 1],
      ["many", "x".repeat(1e5)],
    ];
    for (const [event = "", ...args] of packets) a.io.to(["red", "blue"]).emit(String(event), ...args);
    expect(await heardFrom(a.io, people)).toEqual({ ann: packets, bob: packets, cat: packets });
    expect(await a.io.timeout(2_000).emitWithAck("name?")).toHaveLength(3);
    const gone = received(people.cat.client, "disconnect");
    a.io.in(people.cat.socket.id).disconnectSockets(true);
    await gone;
  });

  test("a custom parser get text and binary, and answer", async () => {
    const { a, bob, people } = await crew(undefined, { parser: msgpack }, { parser: msgpack });
    const outgoing: unknown[][] = [];
    bob.socket.onAnyOutgoing((...event: unknown[]) => outgoing.push(event));
    const packet = ["hello", { n: 1, deep: [Buffer.from("x")] }, null];
    a.io.to(["red", "blue"]).emit("hello", ...packet.slice(1));
    expect(await heardFrom(a.io, people)).toEqual({ ann: [packet], bob: [packet], cat: [packet] });
    expect(outgoing[0]).toEqual(packet);
    const emitter = createEmitter({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    emitter.to("blue").emit("hello", ...packet.slice(1));
    expect(await heardFrom(emitter, people)).toEqual(only("bob cat", people, packet));
    expect(await a.io.timeout(2_000).emitWithAck("name?")).toHaveLength(3);
  });

  test("a parser that keeps dates and NaN keep them in acknowledged broadcasts and their answers", async () => {
    const { a, people } = await crew(undefined, { parser: msgpack }, { parser: msgpack });
    const values = [new Date(0), NaN];
    for (const { client } of Object.values(people))
      client.on("echo", (...args: [...unknown[], (answer: unknown) => void]) => {
        const answer = args.pop() as (answer: unknown) => void;
        answer(args);
      });
    expect(await a.io.timeout(2_000).emitWithAck("echo", ...values)).toEqual([values, values, values]);
    for (const { heard } of Object.values(people)) expect(heard).toEqual([["echo", ...values]]);
  });

  test("a parser whose answer cannot be sent to another server report it there, and give an error", async () => {
    class Decoder extends msgpack.Decoder {
      override add(packet: unknown): void {
        this.once("decoded", ({ data }: { data: unknown }) => {
          if (Array.isArray(data)) data.forEach((value, i) => value === "a BigInt" && (data[i] = 1n));
        });
        super.add(packet);
      }
    }
    const parser = { ...msgpack, Decoder };
    const { a, b, bob, people } = await crew(undefined, { parser }, { parser: msgpack });
    for (const { client } of Object.values(people))
      client.on("ask", (answer: (value: unknown) => void) => answer(client === bob.client ? "a BigInt" : "text"));
    const answers: unknown[] = await a.io.timeout(2_000).emitWithAck("ask");
    expect(answers.map(String).toSorted()).toEqual([expect.stringMatching("cannot be sent"), "text", "text"]);
    expect(errorsOf(b)).toEqual([expect.stringContaining("A packet cannot be encoded for other servers")]);
  });
});

describe("on the broker", () => {
  test("the names are those of dev/protocol.md", async () => {
    const nodes = await cluster({ prefix: undefined });
    const [a, b, c] = nodes;
    const ours = async () => {
      const all = await broker.bindings("socket.io");
      return all.map(({ source, key, kind, destination }) => `${source} --${key}--> ${kind} ${destination}`).toSorted();
    };
    a.io.of("/chat");
    await adapterOf(a.io, "/chat").ready;
    expect((await broker.exchanges("socket.io")).toSorted()).toEqual(["socket.io", "socket.io#keys"]);
    const names = await broker.queues("socket.io#");
    expect(names).toHaveLength(3);
    for (const { name, exclusive } of names)
      expect([name, exclusive]).toEqual([expect.stringMatching(/^socket\.io#@[\w-]+\.\d+$/), true]);

    const keys = names.flatMap(({ name }) => ["/", "@", `@${/@([\w-]+)/.exec(name)?.[1]}`].map((key) => [key, name]));
    const servers = keys.map(([key, queue]) => `socket.io#keys --${key}--> queue ${queue}`);
    await eventually(async () => {
      const [chat, ...others] = (await ours()).toSorted(
        (one, other) => Number(/chat/.test(other)) - Number(/chat/.test(one)),
      );
      expect(chat).toMatch(/^socket\.io#keys --\/chat--> queue socket\.io#@/);
      expect(others).toEqual(["socket.io ----> exchange socket.io#keys", ...servers.toSorted()]);
    });
    const before = await ours();
    const [ann, bob] = await Promise.all([join(b), join(c)]);
    expect(await ours()).toEqual(before); // a connecting client adds nothing

    await ann.socket.join("room42");
    const added = (await ours()).filter((binding) => !before.includes(binding));
    expect(added).toEqual(
      haveRoomExchanges
        ? [
            expect.stringMatching(/^socket\.io#\/#room42 ----> queue socket\.io#@/),
            "socket.io#keys --/#room42--> exchange socket.io#/#room42",
          ]
        : [expect.stringMatching(/^socket\.io#keys --\/#room42--> queue socket\.io#@/)],
    );
    await bob.socket.join("room42");
    await ann.socket.leave("room42");
    if (haveRoomExchanges) expect(await broker.exchanges("socket.io#")).toContain("socket.io#/#room42");
    bob.client.disconnect();
    await eventually(async () => expect(await ours()).toEqual(before));
    expect((await broker.exchanges("socket.io")).toSorted()).toEqual(["socket.io", "socket.io#keys"]);

    await Promise.all(nodes.map(({ io }) => io.close()));
    expect((await broker.exchanges("socket.io")).toSorted()).toEqual(["socket.io", "socket.io#keys"]);
    expect(await broker.queues("socket.io#")).toEqual([]);
  });

  test("roomExchanges: false binds the queue straight to the keys", async () => {
    const { b } = await crew({ roomExchanges: false });
    expect(await exchanges()).toEqual([]);
    const red = (await bindings()).filter(({ key }) => key === "/#red");
    expect(red.map(({ source, kind }) => [source, kind])).toEqual(Array(2).fill([`${prefix}#keys`, "queue"]));
    await eventually(() => expect(b.adapter.stats.rooms).toBe(2));
  });

  test.if(refuseRoomExchanges)("roomExchanges: true is refused, and said why", async () => {
    const node = await start({ roomExchanges: true });
    const [error] = await once(node.adapter, "error");
    expect(String(error)).toMatch(/roomExchanges: true was refused: the broker's version is 4\./);
    errorsOf(node);
  });

  test.if(haveRoomExchanges)(
    "rooms of a server with up to 100 have exchanges, those of a larger one none",
    async () => {
      const node = await start();
      await node.adapter.ready;
      const { client, socket } = await join(node);
      const rooms = Array.from({ length: 150 }, (_, i) => `room${i}`);
      await socket.join(rooms.slice(0, 90));
      await eventually(async () => expect(await exchanges()).toHaveLength(90));
      await socket.join(rooms);
      await eventually(() => expect(node.adapter.stats.rooms).toBe(150));
      await eventually(async () => expect(await exchanges()).toEqual([]));
      const all = Promise.all(rooms.map((room) => received(client, room)));
      for (const room of rooms) node.io.to(room).emit(room);
      await all;
    },
  );

  test('socketRooms: "bound" binds rooms named like a socket id too', async () => {
    const { a, c, cat, people } = await crew({ socketRooms: "bound" });
    await eventually(() => expect(c.adapter.stats.rooms).toBe(2));
    expect((await bindings()).map(({ key }) => key)).toContain(`/#${cat.socket.id}`);
    a.io.to(cat.socket.id).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
  });

  test("a server without the room gets none of its messages, also when several rooms are named", async () => {
    const { nodes, a, b, c, people } = await crew({ heartbeatInterval: 60_000, heartbeatTimeout: 120_000 });
    await settled();
    await Promise.all(nodes.map(({ io }) => io.fetchSockets())); // what was said at the start has arrived
    const before = [b, c].map(({ adapter }) => adapter.stats);
    for (let i = 0; i < 10; i++) {
      a.io.to("red").emit("hello");
      a.io.to(["red", "green"]).emit("hello");
      a.io.to("red").except("green").emit("hello", Buffer.from("x"));
    }
    await eventually(() => expect(a.adapter.stats.unconfirmed).toBe(0)); // what follows is for everyone, in a frame of its own
    await heardFrom(a.io, people);
    const packets = [b, c].map(({ adapter }, n) => adapter.stats.packetsReceived - (before[n]?.packetsReceived ?? NaN));
    expect(packets).toEqual([31, 1]); // the one is heardFrom's
  });

  test.if(scansBindings)("peers know of many new bindings before the next heartbeat", async () => {
    const { a, b, c, bob } = await crew({ heartbeatInterval: 60_000, heartbeatTimeout: 120_000 });
    await bob.socket.join(Array.from({ length: 600 }, (_, i) => `room${i}`));
    await eventually(() => expect(b.adapter.stats.rooms).toBe(602), 5_000);
    const before = c.adapter.stats.packetsReceived;
    // With several keys the broker would scan them all: it goes to everyone.
    await eventually(() => {
      a.io.to(["red", "green"]).emit("hello");
      expect(c.adapter.stats.packetsReceived).toBeGreaterThan(before);
    });
  });

  test.if(haveRoomExchanges)(
    "a room whose exchange went with another server's queue is bound again",
    async () => {
      const { a, c, ann, bob } = await crew();
      const connection = await connect(broker.url);
      await (await connection.createChannel()).deleteExchange(`${prefix}#/#red`);
      await connection.close();
      await c.io.close();
      const red = `${prefix}#/#red`;
      await eventually(async () => {
        const all = await bindings();
        expect(
          all.filter(({ source, destination }) => destination === red && source === `${prefix}#keys`),
        ).toHaveLength(1);
        expect(all.filter(({ source }) => source === red)).toHaveLength(2);
      }, 10_000);
      a.io.to("red").emit("hello");
      expect(await heardFrom(a.io, { ann, bob })).toEqual({ ann: [["hello"]], bob: [["hello"]] });
    },
    20_000,
  );

  test.if(haveRoomExchanges)("a room's exchange that was declared just before a loss does not stay", async () => {
    const link = await Proxy.open(broker.port);
    const amqpConnection = async () => {
      const connection = await connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
      const { createChannel } = connection;
      connection.createChannel = async (options) => {
        const channel = await createChannel.call(connection, options);
        const { bindQueue } = channel;
        channel.bindQueue = (queue, exchange, ...more) => {
          if (exchange.endsWith("#red")) link.cut();
          return bindQueue.call(channel, queue, exchange, ...more);
        };
        return channel;
      };
      return connection;
    };
    const node = await start({ amqpConnection });
    await node.adapter.ready;
    const { socket } = await join(node);
    const lost = once(node.adapter, "disconnect");
    await socket.join("red");
    await lost;
    await socket.leave("red");
    expect(await exchanges()).toEqual([`${prefix}#/#red`]);
    link.heal();
    await eventually(async () => expect(await exchanges()).toEqual([]));
    await node.adapter.close();
    link.close();
    errorsOf(node);
  });

  test("queueArguments are the queue's", async () => {
    const { adapter } = await start({ queueArguments: { "x-max-length": 1_000 } });
    await adapter.ready;
    const all = await broker.evaluate<string[][]>(
      `[[Queue, Key, Value] || [{name, {_, _, _, Queue}}, {arguments, Arguments}] <-
        rabbit_amqqueue:info_all(<<"/">>, [name, arguments]), {Key, _, Value} <- Arguments]`,
    );
    expect(all).toContainEqual([expect.stringContaining(`${prefix}#@`), "x-max-length", 1_000]);
  });

  test("what the adapter did stands in its stats", async () => {
    const { a, b, people } = await crew();
    await settled();
    expect(a.adapter.stats).toMatchObject({ connected: true, rooms: 1, packetsSent: 0, lost: 0, lastError: undefined });
    expect(b.adapter.stats).toMatchObject({ connected: true, rooms: 2, reconnects: { consuming: 0, publishing: 0 } });
    for (let i = 0; i < 50; i++) a.io.to("red").emit("hello");
    await heardFrom(a.io, people);
    expect(a.adapter.stats.packetsSent).toBe(51);
    expect(b.adapter.stats.packetsReceived).toBe(51);
    expect(a.adapter.stats.framesSent).toBeLessThanOrEqual(51);
    await eventually(() => expect(a.adapter.stats.unconfirmed).toBe(0));
  });

  test("stats print as a short block, and are a plain object to code", async () => {
    const { adapter } = (await crew()).a;
    await eventually(() => expect(adapter.stats.rooms).toBe(1)); // live before it is bound
    const { stats } = adapter;
    for (const printed of [Bun.inspect(stats), inspect(stats)]) {
      expect(printed.split("\n").length).toBeLessThanOrEqual(6);
      expect(printed).toMatch(/connected; 1 rooms; [^]* lost 0, dropped 0\n  last error: none$/);
    }
    expect(Object.keys(JSON.parse(JSON.stringify(stats)))).toContain("packetsSent");
  });
});

describe("an emitter", () => {
  const emitting = (options: Partial<EmitterOptions> = {}): Emitter => {
    const emitter = createEmitter({ amqpConnection, prefix, ...options });
    closers.push(() => emitter.close());
    return emitter;
  };

  const sharedCrew = shared(async () => {
    const emitter = emitting();
    await emitter.ready;
    return { emitter, ...(await crew()) };
  });
  test.each<[what: string, hearers: string, target: (emitter: Emitter, cat: Member) => Emitting]>([
    ["everyone", "ann bob cat", (emitter) => emitter],
    ["a room", "ann bob", (emitter) => emitter.to("red")],
    ["rooms, once each", "ann bob cat", (emitter) => emitter.to("red").in(["blue", "green"])],
    ["all but a room", "cat", (emitter) => emitter.except("red")],
    ["all but several rooms", "", (emitter) => emitter.except(["red"]).except("blue")],
    ["a room but for a socket", "bob", (emitter, cat) => emitter.to("blue").except(cat.socket.id)],
    ["a socket", "cat", (emitter, cat) => emitter.to(cat.socket.id)],
    ["everyone, volatile", "ann bob cat", (emitter) => emitter.volatile],
    ["everyone, uncompressed", "ann bob cat", (emitter) => emitter.compress(false)],
  ])("reaches %s", async (_, hearers, target) => {
    const { people, cat, emitter } = await sharedCrew();
    const event = ["hello", 1, { deep: [Buffer.from("x")] }];
    target(emitter, cat).emit("hello", ...event.slice(1));
    expect(await heardFrom(emitter, people)).toEqual(only(hearers, people, event));
  });

  test("rejects its close() with the number of packets that did not get out, dropped ones among them", async () => {
    const link = await Proxy.open(broker.port);
    const lost = Promise.withResolvers<void>();
    const emitter = createEmitter({
      amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`),
      prefix,
      journal: { ms: 50 },
      onError: (error) => error.message.includes("publishing") && lost.resolve(),
      closeTimeout: 200,
    });
    await emitter.ready;
    link.cut();
    await lost.promise;
    emitter.emit("hello");
    await expect(emitter.close()).rejects.toThrow("Closed before the broker had confirmed 1 packets");
    link.close();
  });

  test("reaches rooms that it names behind a room that it has just emitted to", async () => {
    const [a, b] = await cluster();
    const [{ client: ann }, { client: bob }] = [await join(a, ["red"]), await join(b, ["blue"])];
    const emitter = emitting();
    await emitter.ready;
    const heard: unknown[][] = [[], []];
    for (const [i, client] of [ann, bob].entries()) client.on("n", (n: number) => heard[i]?.push(n));
    emitter.to("red").emit("n", 1);
    emitter.to(["red", "green"]).emit("n", 2);
    emitter.to(["red", "blue"]).emit("n", 3);
    await eventually(() => expect(heard).toEqual([[1, 2, 3], [3]]));
  });

  test("reaches one namespace, with the types of its events", async () => {
    const [, b] = await cluster();
    const { client } = await join(b, ["red"], "/chat");
    await adapterOf(b.io, "/chat").ready;
    const emitter = createEmitter<{ hello: (name: string, n: number) => void }>({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    const hello = received(client, "hello");
    emitter.of("/chat").to("red").emit("hello", "world", 1);
    // @ts-expect-error: the second argument is a number
    emitter.of("/nobody").emit("hello", "world", "1");
    expect(await hello).toEqual(["world", 1]);
  });

  test("makes sockets join, leave and disconnect", async () => {
    const { a, b, bob, cat, people } = await crew();
    const emitter = emitting();
    emitter.in("blue").socketsJoin(["green", "yellow"]);
    emitter.in("red").socketsLeave("green");
    await heardFrom(emitter, people);
    expect([bob.socket.rooms, cat.socket.rooms].map((rooms) => [rooms.has("green"), rooms.has("yellow")])).toEqual([
      [false, true],
      [true, true],
    ]);
    const gone = [bob, cat].map(({ client }) => received(client, "disconnect"));
    emitter.to("yellow").emit("bye"); // Bob and Cat may not be bound to it yet
    emitter.in("blue").disconnectSockets(true);
    await Promise.all(gone);
    expect(await a.io.fetchSockets()).toHaveLength(1);
    expect(b.io.of("/").sockets.size).toBe(0);
  });

  test("that makes sockets join what is no room harms no server", async () => {
    const { bob, people } = await crew();
    const emitter = emitting();
    emitter.in("blue").socketsJoin([{ toString: "none" }] as unknown as string[]);
    await heardFrom(emitter, people);
    const gone = once(bob.socket, "disconnect");
    bob.client.disconnect();
    await gone;
  });

  test("keeps its rooms in another namespace", async () => {
    const { a, cat } = await crew();
    const [dan, eve] = await Promise.all([join(a, ["red"], "/chat"), join(a, ["blue"], "/chat")]);
    const emitter = emitting();
    emitter.to("blue").of("/chat").emit("hello");
    const people = { cat, dan, eve };
    const heard = heardFrom(emitter, people);
    emitter.of("/chat").emit("end");
    expect(await heard).toEqual(only("eve", people, ["hello"]));
  });

  test("emits to the servers, and is none of them", async () => {
    const nodes = await cluster();
    const emitter = emitting();
    const all = Promise.all(nodes.map(({ io }) => once(io, "hello")));
    emitter.serverSideEmit("hello", "world", Buffer.from("x"));
    expect(await all).toEqual(Array(3).fill(["world", Buffer.from("x")]));
    expect(await nodes[0].adapter.serverCount()).toBe(3);
    expect(() => emitter.serverSideEmit("hello", () => {})).toThrow("leave out the callback");
    expect(() => emitter.emit("hello", () => {})).toThrow("leave out the callback");
    expect(() => emitter.emit("disconnect")).toThrow("reserved");
    expect(() => emitter.serverSideEmit("connection")).toThrow("reserved");
  });

  test("has everything confirmed by the broker when close() resolves", async () => {
    const { cat } = await crew();
    const last = received(cat.client, "last");
    const emitter = createEmitter({ amqpConnection, prefix });
    for (let i = 0; i < 2_000; i++) emitter.to("blue").emit("n", i);
    emitter.emit("last");
    await emitter.close();
    await last;
    expect(cat.heard.slice(0, -1).map(([, i]) => i)).toEqual(Array.from({ length: 2_000 }, (_, i) => i));
    expect(() => emitter.emit("late")).toThrow();
  });

  test("may emit to any number of namespaces, of which it remembers a thousand", async () => {
    const emitter = createEmitter({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    const kept = () => (Bun.gc(true), heapStats().objectTypeCounts["Map"] ?? 0);
    const before = kept();
    for (let i = 0; i < 3_500; i++) emitter.of(`/chat${i}`);
    expect(kept() - before).toBeLessThan(3_500); // three of each
  });

  test("alone leaves nothing behind", async () => {
    const emitter = createEmitter({ amqpConnection, prefix });
    await emitter.ready;
    emitter.to("nobody").emit("hello");
    await emitter.close();
    expect([await exchanges(), await queues()]).toEqual([[], []]);
  });

  test("reports what goes wrong to onError", async () => {
    const reported = Promise.withResolvers<Error>();
    const emitter = createEmitter({ amqpConnection, prefix, maxPayload: 1_000, onError: reported.resolve });
    closers.push(() => emitter.close());
    emitter.emit("big", "x".repeat(2_000));
    expect((await reported.promise).message).toMatch(/maxPayload|1000|1_000/);
  });
});

describe("a JSON array from any AMQP client", () => {
  const sharedCrew = shared(async () => ({ prefix, ...(await crew()) }));
  test.each<[what: string, hearers: string, exchange: string, key: string]>([
    ["under a room's key is for the room", "ann bob", "", "/#red"],
    ["under a namespace's key is for everyone in it", "ann bob cat", "", "/"],
    ["under a room's key, to the keys, is for the room", "ann bob", "#keys", "/#red"],
    ["for an empty room is for nobody", "", "", "/#green"],
    ["for another namespace is for nobody here", "", "", "/chat"],
    ["for a room with no namespace is for nobody", "", "", "#red"],
  ])("%s", async (_, hearers, exchange, key) => {
    const { people, prefix } = await sharedCrew();
    await publish(prefix + exchange, key, '["hello","world",{"n":1}]', JSON_TYPE);
    expect(await heardFrom(anybody(prefix), people)).toEqual(only(hearers, people, ["hello", "world", { n: 1 }]));
  });

  const anybody = (prefix: string) => ({
    emit: (event: string) => publish(prefix, "/", JSON.stringify([event]), JSON_TYPE),
  });

  test.if(haveRoomExchanges)("to a room's exchange, with any key, is for the room", async () => {
    const { people } = await crew();
    for (const key of ["", "whatever"]) await publish(`${prefix}#/#red`, key, '["hello"]', JSON_TYPE);
    const twice = [["hello"], ["hello"]];
    expect(await heardFrom(anybody(prefix), people)).toEqual({ ann: twice, bob: twice, cat: [] });
  });

  test.if(haveRoomExchanges)(
    "with a room of 300 characters goes to the exchange that stands on the broker",
    async () => {
      const { cat } = await crew();
      await cat.socket.join("x".repeat(300));
      const others = ["#/#red", "#/#blue"].map((name) => prefix + name);
      const [exchange = ""] = (await exchanges()).filter((name) => !others.includes(name));
      const hello = received(cat.client, "hello");
      await publish(exchange, "", '["hello"]', JSON_TYPE);
      await hello;
    },
  );
});

describe("a bad message", () => {
  const sharedCrew = shared(async () => ({ prefix, ...(await crew({ maxPayload: 10_000 })) }));
  test.each<[what: string, body: string | Buffer, properties: Amqp.Publish]>([
    ["empty", "", {}],
    ["of random bytes", Buffer.from("c3a1ff0000009f7f8812fe", "hex"), {}],
    ["of text", "hello", { contentType: "text/plain" }],
    ["of broken JSON", '["hello"', JSON_TYPE],
    ["of deep JSON", "[".repeat(100_000), JSON_TYPE],
    ["of a JSON object", '{"hello":"world"}', JSON_TYPE],
    ["of an empty JSON array", "[]", JSON_TYPE],
    ["of an event without a name", "[1]", JSON_TYPE],
    ["of a reserved event", '["disconnect"]', JSON_TYPE],
    ["larger than maxPayload", JSON.stringify(["big", "x".repeat(20_000)]), JSON_TYPE],
  ])("%s is reported and dropped, and the next one is handled", async (_, body, properties) => {
    const { nodes, people, prefix } = await sharedCrew();
    const reported = Promise.all(nodes.map(({ adapter }) => once(adapter, "error")));
    await publish(prefix, "/", body, properties);
    await reported;
    for (const node of nodes) expect(errorsOf(node)).toHaveLength(1);
    expect(await heardFrom(nodes[0].io, people)).toEqual(only("", people, []));
    await reunited(nodes);
  });

  test("straight into a server's queue is reported and dropped", async () => {
    const { nodes } = await crew();
    const reported = Promise.all(nodes.map(({ adapter }) => once(adapter, "error")));
    for (const { name } of await queues()) await publish("", name, "hello", { headers: { a: 1 } });
    await reported;
    for (const node of nodes) expect(errorsOf(node)).toHaveLength(1);
    await reunited(nodes);
  });

  test("of a server whose numbers count nothing is reported and dropped", async () => {
    const { nodes, a, b } = await crew();
    const counts = [-1, 0.5, 1e308, "7", null];
    for (const number of counts) {
      const beat = { type: "beat", revision: 1, bindings: 0, number, floor: 0 };
      const reported = once(b.adapter, "error");
      await publish(`${prefix}#keys`, `@${b.adapter.uid}`, control(a.adapter.uid, JSON.stringify(beat)));
      await reported;
    }
    expect(errorsOf(b)).toHaveLength(counts.length);
    await reunited(nodes);
  });

  test("that was cut short on the way harms nothing", async () => {
    const { nodes, a, people } = await crew();
    const spy = await connect(broker.url);
    closers.push(() => spy.close());
    const channel = await spy.createChannel();
    const { queue } = await channel.assertQueue("", { exclusive: true });
    await channel.bindQueue(queue, prefix, "");
    a.io.emit("hello", { deep: Buffer.from("x") }, "world");
    await eventually(async () => {
      const message = await channel.get(queue, { noAck: true });
      if (!message) throw new Error("no frame yet");
      for (let length = 0; length < message.content.length; length += 3)
        channel.publish(prefix, "/", message.content.subarray(0, length), message.properties);
    });
    await reunited(nodes);
    await heardFrom(a.io, people);
    nodes.forEach(errorsOf);
  });

  test("with nobody listening for errors is dropped as well", async () => {
    const { nodes, people } = await crew();
    for (const { adapter } of nodes) adapter.removeAllListeners("error");
    await publish(prefix, "/", "hello");
    expect(await heardFrom(nodes[0].io, people)).toEqual(only("", people, []));
    await eventually(() => expect(nodes[2].adapter.stats.lastError).toBeInstanceOf(Error));
  });

  test("is none of several packets that only together are over maxPayload", async () => {
    const { a, cat, people } = await crew({ maxPayload: 10_000 });
    const texts = ["a", "é", "語"].map((char) => char.repeat(2_000));
    for (const text of texts) a.io.to("blue").emit("text", text);
    expect((await heardFrom(a.io, people)).cat).toEqual(texts.map((text) => ["text", text]));
    expect(cat.heard).toEqual([]);
  });

  test("is none of many packets whose exceptions only together are over maxPayload", async () => {
    const { a, cat, people } = await crew({ maxPayload: 10_000 });
    const numbers = Array.from({ length: 50 }, (_, i) => i);
    const roomsOf = (i: number) => numbers.map((room) => `nobody is in room ${room} of ${i}`);
    for (const i of numbers) a.io.to("blue").except(roomsOf(i)).emit("number", i);
    expect((await heardFrom(a.io, people)).cat).toEqual(numbers.map((i) => ["number", i]));
    expect(cat.heard).toEqual([]);
  });

  test("a packet that only its many binaries bring over maxPayload is reported where it is emitted", async () => {
    const a = await start({ maxPayload: 20_000 });
    a.io.emit("binaries", ...Array.from({ length: 550 }, () => Buffer.alloc(1)));
    await once(a.adapter, "error");
    expect(errorsOf(a)).toEqual([expect.stringMatching(/not sent.*maxPayload/)]);
  });

  test("larger than this server's own maxPayload costs no other packet of a server whose maxPayload is larger", async () => {
    const [a, b] = await Promise.all([start(), start({ maxPayload: 10_000 })]);
    await acquainted([a, b]);
    const bob = await join(b);
    introduce({ bob });
    for (let i = 0; i < 10; i++) {
      a.io.emit("big", "x".repeat(70_000));
      a.io.emit("small", i);
    }
    expect((await heardFrom(a.io, { bob })).bob).toEqual(Array.from({ length: 10 }, (_, i) => ["small", i]));
    expect(errorsOf(a)).toEqual([expect.stringMatching(/give all of them the same/)]);
    expect(errorsOf(b).filter((error) => /a message of 7\d{4} bytes/.test(error))).toHaveLength(10);
  });

  test("a packet over maxPayload is reported, delivered locally, and costs no other", async () => {
    const { a, people } = await crew({ maxPayload: 10_000 });
    const packets = [
      ["one"],
      ["big", "x".repeat(20_000)],
      ["two"],
      ["big", Buffer.alloc(20_000)],
      ["three", "x".repeat(9_000)],
    ];
    for (const [event = "", ...args] of packets) a.io.emit(String(event), ...args);
    const small = packets.filter(([event]) => event !== "big");
    expect(await heardFrom(a.io, people)).toEqual({ ann: packets, bob: small, cat: small });
    expect(errorsOf(a)).toEqual([expect.stringMatching(/maxPayload/), expect.stringMatching(/maxPayload/)]);
  });

  test("of an unknown version is reported once per sender", async () => {
    const { nodes, people } = await crew();
    const frame = Buffer.alloc(32);
    frame[0] = 3;
    const reported = Promise.all(nodes.map(({ adapter }) => once(adapter, "error")));
    for (const sender of ["somebody", "somebody", "another-"]) {
      frame.write(sender, 2, "latin1");
      await publish(prefix, "/", frame);
    }
    await reported;
    expect(await heardFrom(nodes[0].io, people)).toEqual(only("", people, []));
    for (const node of nodes) expect(errorsOf(node).filter((error) => error.includes("version 3"))).toHaveLength(2);
  });
});

describe("a connection", () => {
  const opened: Record<string, () => Promise<AdapterOptions["amqpConnection"]>> = {
    "that is a promise": async () => () => connect(broker.url),
    "that is an object, one for each call": async () => {
      const connections = [await connect(broker.url), await connect(broker.url)];
      return () => connections.shift() ?? connect(broker.url);
    },
  };
  test.each(Object.entries(opened))("%s serves a server", async (_, opened) => {
    const [a, b, c] = await Promise.all([start(), start(), start({ amqpConnection: await opened() })]);
    await acquainted([a, b, c]);
    const [ann, cat] = await Promise.all([join(a, ["red"]), join(c, ["red"])]);
    const all = [ann, cat].flatMap(({ client }) => [received(client, "from b"), received(client, "from c")]);
    b.io.to("red").emit("from b");
    c.io.to("red").emit("from c");
    await Promise.all(all);
  });

  test("that fails is tried again, and said so", async () => {
    let calls = 0;
    const node = await start({
      amqpConnection: () => {
        if (++calls === 1) throw new Error("thrown");
        if (calls === 2) return Promise.reject(new Error("rejected"));
        if (calls === 3) return {} as ChannelModel;
        return calls < 6 ? connect("amqp://127.0.0.1:1") : connect(broker.url);
      },
    });
    await node.adapter.ready;
    const said = errorsOf(node).join();
    expect(said).toContain("The consuming connection could not be opened: thrown");
    expect(said).toContain("rejected");
    expect(said).toContain("amqpConnection returned {}");
    expect(said).toContain("ECONNREFUSED");
    expect(node.adapter.stats.connected).toBe(true);
  });

  test("with a small frame_max carries an emit to a thousand rooms, and stays", async () => {
    const { a, bob, people } = await crew({ amqpConnection: () => connect(urlWith({ search: "frameMax=8192" })) });
    const rooms = Array.from({ length: 1_000 }, (_, i) => `room-${i}`);
    const hello = received(bob.client, "hello");
    a.io.to([...rooms, "blue"]).emit("hello");
    await hello; // what follows would share the message, and its keys
    expect(await heardFrom(a.io, people)).toEqual(only("bob cat", people, ["hello"]));
    expect(a.adapter.stats.reconnects).toEqual({ consuming: 0, publishing: 0 });
  });

  test("stays when an emit names more rooms than amqplib has room for in a header", async () => {
    const { a, people } = await crew();
    a.io.to([...Array.from({ length: 2_000 }, (_, i) => `${"房".repeat(10)}${i}`), "blue"]).emit("hello");
    await eventually(() => expect(a.adapter.stats.unconfirmed).toBe(0));
    expect(await heardFrom(a.io, people)).toEqual(only("bob cat", people, ["hello"]));
    expect(a.adapter.stats.reconnects).toEqual({ consuming: 0, publishing: 0 });
  });

  test.each([
    [
      "with too few channels",
      { search: "channelMax=2" },
      /No channels left.*; allow at least \d+ channels: channelMax/,
    ],
    [
      "to a virtual host that is missing",
      { pathname: "/no-such-host" },
      /; create the virtual host that the URL names/,
    ],
  ])("%s says what to do", async (_, part, advice) => {
    const node = await start({ amqpConnection: () => connect(urlWith(part)) });
    const [error] = await once(node.adapter, "error");
    expect(String(error)).toMatch(advice);
    await node.io.close();
    errorsOf(node);
  });

  test("that never comes costs local sockets nothing", async () => {
    const node = await start({ amqpConnection: () => connect("amqp://127.0.0.1:1"), requestsTimeout: 200 });
    const ann = await join(node);
    expect(await milliseconds(async () => ann.socket.join("red"))).toBeLessThan(200);
    node.io.to("red").emit("hello");
    expect(await heardFrom(node.io, { ann })).toEqual({ ann: [["hello"]] });
    expect(await milliseconds(() => node.io.fetchSockets())).toBeLessThan(200);
    expect(node.adapter.stats).toMatchObject({ connected: false, reconnects: { consuming: 0, publishing: 0 } });
    expect(await milliseconds(() => node.io.close())).toBeLessThan(700); // its two packets wait for requestsTimeout
    await expect(node.adapter.ready).rejects.toThrow("closed");
    expect(errorsOf(node).at(-1)).toContain("had confirmed 2 packets");
  });

  test.each<[when: string, recovery: true | { waitForConnect: false }]>([
    ["at once", true],
    ["later", { waitForConnect: false }],
  ])("that amqplib itself would open again, %s, is refused and closed", async (_, recovery) => {
    const opened: RecoveringChannelModel[] = [];
    const recovering = async () => {
      const model = await connect(broker.url, { recovery });
      opened.push(model);
      return model as unknown as ChannelModel;
    };
    const node = await start({ amqpConnection: recovering });
    const [error] = await once(node.adapter, "error");
    expect(String(error)).toContain("leave it out");
    const ann = await join(node);
    expect(await milliseconds(async () => ann.socket.join("red"))).toBeLessThan(500);
    await node.io.close();
    for (const model of opened) await expect((async () => model.createChannel())()).rejects.toThrow();
    for (const error of errorsOf(node)) expect(error).toContain("amqplib's recovery");
  });

  test("that is closed without a promise is closed all the same", async () => {
    const odd = async () => {
      const model = await connect(broker.url);
      const close = model.close.bind(model);
      model.close = (() => void close().catch(() => {})) as unknown as typeof close;
      return model;
    };
    const node = await start({ amqpConnection: odd });
    await node.adapter.ready;
    await closeConnections();
    await eventually(() => expect(node.adapter.stats.reconnects).toEqual({ consuming: 1, publishing: 1 }));
    errorsOf(node);
  });

  test("that the broker blocks for longer than heartbeatTimeout stays", async () => {
    const heartbeats = { heartbeatInterval: 50, heartbeatTimeout: 150 };
    const { nodes, a, people } = await crew(heartbeats);
    const blocked = once(a.adapter, "error");
    await broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.0)");
    try {
      a.io.emit("blocked");
      await blocked;
      await Bun.sleep(500); // three times heartbeatTimeout
    } finally {
      await broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.4)");
    }
    await heardFrom(a.io, people);
    for (const node of nodes) {
      expect(node.adapter.stats.reconnects).toEqual({ consuming: 0, publishing: 0 });
      for (const error of errorsOf(node)) expect(error).toContain("blocks publishing");
    }
  });

  test("whose queue has lost its bindings is opened again, and nothing is lost", async () => {
    const heartbeats = { heartbeatInterval: 100, heartbeatTimeout: 400 };
    const [a, b] = await Promise.all([start(heartbeats), start(heartbeats)]);
    await acquainted([a, b]);
    const bob = await join(b, ["red"]);
    await settled();
    const admin = await connect(broker.url);
    const channel = await admin.createChannel();
    await channel.deleteExchange(`${prefix}#keys`);
    await admin.close();
    await eventually(() => expect(a.adapter.stats.reconnects.publishing).toBe(1));
    for (let n = 0; n < 5; n++) a.io.to("red").emit("n", n);
    await eventually(() => expect(bob.heard.map(([, n]) => n)).toEqual([0, 1, 2, 3, 4]), 4_000);
    for (const node of [a, b])
      for (const error of errorsOf(node)) expect(error).toMatch(/no exchange|The queue gets nothing any more/);
    expect(b.adapter.stats.reconnects.consuming).toBe(1);
  });

  test("that is returned a second time is refused, and said what to do", async () => {
    const one = await connect(broker.url);
    const node = await start({ amqpConnection: () => one });
    const [error] = await once(node.adapter, "error");
    expect(String(error)).toContain("return a new connection from each call");
    errorsOf(node);
  });

  test("is ready though somebody's queue is full and refuses what the server says", async () => {
    const other = await connect(broker.url);
    closers.push(() => other.close());
    const channel = await other.createChannel();
    const full = { "x-max-length": 1, "x-overflow": "reject-publish" };
    const { queue } = await channel.assertQueue("", { exclusive: true, arguments: full });
    channel.sendToQueue(queue, Buffer.from("hello"));
    await channel.assertExchange(`${prefix}#keys`, "direct");
    await channel.bindQueue(queue, `${prefix}#keys`, "@");
    const { adapter } = await start();
    await adapter.ready;
  });

  const faults: Record<string, (channels: Channel[]) => Promise<unknown>> = {
    "closed by the operator": closeConnections,
    "whose queue the operator deletes": async () => broker.ctl("delete_queue", (await queues())[0]?.name ?? ""),
    "whose channels the broker closes": (channels) =>
      Promise.allSettled(channels.map((channel) => channel.checkExchange("is not there"))),
  };
  test.each(Object.entries(faults))(
    "%s is opened again, and everything bound",
    async (_, fault) => {
      const channels: Channel[] = [];
      const { nodes } = await crew({
        amqpConnection: async () => {
          const connection = await connect(broker.url);
          const { createChannel, createConfirmChannel } = connection;
          connection.createChannel = async (options) => {
            const channel = await createChannel.call(connection, options);
            channels.push(channel);
            return channel;
          };
          connection.createConfirmChannel = async (options) => {
            const channel = await createConfirmChannel.call(connection, options);
            channels.push(channel);
            return channel;
          };
          return connection;
        },
      });
      const reported = Promise.race(nodes.map(({ adapter }) => once(adapter, "error")));
      await fault(channels);
      await reported;
      await reunited(nodes);
      for (const node of nodes) expect(await node.io.fetchSockets()).toHaveLength(3);
      nodes.forEach(errorsOf);
    },
    30_000,
  );

  test("comes back with the broker, which may also be away at the start", async () => {
    const [a, b] = await Promise.all([start(), start()]);
    await acquainted([a, b]);
    const [ann, bob] = await Promise.all([join(a, ["red"]), join(b, ["red", "blue"])]);
    await broker.stop();
    const c = await start();
    const cat = await join(c);
    expect(await milliseconds(async () => cat.socket.join("blue"))).toBeLessThan(200);
    c.io.to("blue").emit("hello");
    expect(await heardFrom(c.io, { cat })).toEqual({ cat: [["hello"]] });
    expect(a.adapter.stats.connected).toBe(false);
    await ann.socket.leave("red");
    await ann.socket.join("green");
    await broker.start();
    introduce({ ann, bob, cat });
    await reunited([a, b, c], ["red", "blue", "green"]);
    expect((await a.io.in("red").fetchSockets()).map(({ id }) => id)).toEqual([bob.socket.id]);
    const rooms = async () => new Set((await bindings()).map(({ key }) => key).filter((key) => key.includes("#")));
    await eventually(async () => expect([...(await rooms())].toSorted()).toEqual(["/#blue", "/#green", "/#red"]));
    for (const node of [a, b, c]) expect(errorsOf(node).length).toBeGreaterThan(0);
  }, 60_000);

  test("without permission is refused, said so, and works as soon as the least permission is given", async () => {
    const user = `${RUN}-user`;
    const users = (change: string, ...values: string[]) => {
      const binaries = [user, ...values, "tests"].map((value) => `<<${JSON.stringify(value)}>>`);
      return broker.evaluate(`rabbit_auth_backend_internal:${change}(${binaries.join()})`);
    };
    await users("add_user", "secret");
    closers.push(() => users("delete_user"));
    await users("set_permissions", "/", "^$", "^$", "^$");
    const [a, b] = await Promise.all([start(), start()]);
    await acquainted([a, b]);
    const url = urlWith({ username: user, password: "secret" });
    const c = await start({ amqpConnection: () => connect(url) });
    const [error] = await once(c.adapter, "error");
    expect(String(error)).toMatch(/403|ACCESS_REFUSED/);
    const ours = `^${prefix}(#|$)`;
    await users("set_permissions", "/", ours, ours, ours);
    await c.adapter.ready;
    await acquainted([a, b, c]);
    const cat = await join(c, ["red"]);
    b.io.to("red").emit("hello");
    expect(await heardFrom(b.io, { cat })).toEqual({ cat: [["hello"]] });
    expect(errorsOf(c).length).toBeLessThan(20); // no hot loop
    await c.adapter.close(); // before its user is deleted
    errorsOf(c);
  }, 60_000);

  test("that the broker blocks holds what is published, and joins go on", async () => {
    const { nodes, a, cat, people } = await crew();
    const hello = received(cat.client, "hello");
    await broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.0)");
    try {
      const blocked = once(a.adapter, "error");
      a.io.emit("blocked");
      expect(String(await blocked)).toMatch(/block/i);
      await cat.socket.join("green");
      a.io.to("green").emit("hello");
    } finally {
      await broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.4)");
    }
    await hello;
    expect(await heardFrom(a.io, people)).toEqual({
      ann: [["blocked"]],
      bob: [["blocked"]],
      cat: [["blocked"], ["hello"]],
    });
    nodes.forEach(errorsOf);
  }, 30_000);
});

describe("an outage", () => {
  /** The crew, each server behind a link of its own, that can be cut. */
  async function linked(options: Partial<AdapterOptions> = {}) {
    const links = await Promise.all([Proxy.open(broker.port), Proxy.open(broker.port), Proxy.open(broker.port)]);
    const [a, b, c] = await Promise.all(
      links.map(({ port }) =>
        start({ ...options, amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${port}?heartbeat=1`) }),
      ),
    );
    if (!a || !b || !c) throw new Error("three links are three servers");
    const nodes = [a, b, c];
    closers.push(async () => {
      await Promise.all(nodes.map(({ adapter }) => adapter.close()));
      for (const link of links) link.close();
    });
    await acquainted(nodes);
    const [bob, cat] = await Promise.all([join(b, ["red"]), join(c, ["red"])]);
    return { links, nodes, a, b, c, bob, cat };
  }

  /** Emits numbers to the room, plain and with binary, until it is told to stop. Returns how many it has emitted. */
  async function count({ io }: Node, sender: string, until: Promise<unknown>): Promise<number> {
    let stopped = false;
    void until.then(() => (stopped = true));
    let number = 0;
    for await (const _ of setInterval(5)) {
      io.to("red").emit("number", sender, number, ...(number % 7 === 0 ? [Buffer.from([number % 256])] : []));
      number++;
      if (stopped) return number;
    }
    return number;
  }

  /** The numbers of one sender that a client has heard. */
  const numbers = ({ heard }: Member, sender: string): unknown[] =>
    heard.filter(([event, from]) => event === "number" && from === sender).map(([, , number]) => number);
  const upTo = (count: number): number[] => Array.from({ length: count }, (_, number) => number);

  /** Two servers, each behind a link of its own. Bob, at the second, has heard number 0. */
  async function pair(passes: { a?: Pass; b?: Pass } = {}, options: Partial<AdapterOptions> = {}) {
    const [linkA, linkB] = [await Proxy.open(broker.port), await Proxy.open(broker.port)];
    const nodes = await Promise.all([
      start({ ...options, amqpConnection: tampered(passes.a ?? unchanged, linkA.port) }),
      start({ ...options, amqpConnection: tampered(passes.b ?? unchanged, linkB.port) }),
    ]);
    const [a, b] = nodes;
    closers.push(async () => {
      await Promise.all([a.adapter.close(), b.adapter.close()]);
      for (const link of [linkA, linkB]) link.close();
      nodes.forEach(errorsOf);
    });
    await acquainted(nodes);
    const bob = await join(b, ["red", "blue"]);
    a.io.to("red").emit("number", "a", 0);
    await received(bob.client, "number");
    /** Each in a frame of its own. */
    const emit = async (from: number, to: number, turn = 20, ...more: unknown[]) => {
      for (let number = from; number <= to; number++) {
        a.io.to(number % 2 ? "blue" : "red").emit("number", "a", number, ...more);
        if (number % turn === 0) await Bun.sleep(0);
      }
      await eventually(() => expect(a.adapter.stats.unconfirmed).toBe(0), 10_000);
    };
    /** What bob has heard, once he has this number. */
    const until = async (number: number) => {
      await eventually(() => expect(numbers(bob, "a")).toContain(number), 20_000);
      return numbers(bob, "a");
    };
    const back = (node: Node) => eventually(() => expect(node.adapter.stats.connected).toBe(true), 10_000);
    return { linkA, linkB, nodes, a, b, bob, emit, until, back };
  }

  /** Two servers, the second behind a link that is cut while the first emits these numbers, each in a frame of its own. */
  async function missed(count: number, pass: Pass) {
    const two = await pair({ a: pass });
    two.linkB.cut();
    await two.emit(1, count - 1);
    two.linkB.heal();
    return two;
  }

  const faults: Record<string, (links: Proxy[], sender: Server) => Promise<unknown>> = {
    "of the receiver": async ([, link], sender) => {
      link?.cut();
      await Bun.sleep(150);
      sender.to("red").emit("large", Buffer.alloc(2 ** 24 - 5_000)); // the default of maxPayload is 2 ** 24
      await Bun.sleep(150);
      link?.heal();
    },
    "of the sender": async ([link]) => (link?.cut(), Bun.sleep(300).then(() => link?.heal())),
    "of everybody": async (links) => {
      for (const link of links) link.cut();
      await Bun.sleep(300);
      for (const link of links) link.heal();
    },
    "of the publishing connections": async (links) => {
      for (const link of links) link.cut("publishing");
      for (const link of links) link.heal();
    },
    "of the consuming connections": async (links) => {
      for (const link of links) link.cut("consuming");
      for (const link of links) link.heal();
    },
    "of the broker": () => broker.stop().then(() => broker.start()),
    "that nobody is told of": async ([, link]) => {
      link?.silence();
      await Bun.sleep(1_000);
    },
  };
  const stricken = shared(linked);
  test.each(Object.entries(faults))(
    "%s loses, doubles and reorders nothing",
    async (_, fault) => {
      const { links, nodes, a, b, bob, cat } = await stricken();
      for (const { heard } of [bob, cat]) heard.length = 0;
      const over = Promise.withResolvers<void>();
      const counted = Promise.all([count(a, "a", over.promise), count(b, "b", over.promise)]);
      await eventually(() => expect(numbers(cat, "a").length).toBeGreaterThan(20));
      await fault(links, a.io);
      await eventually(() => {
        for (const { adapter } of nodes) expect(adapter.stats).toMatchObject({ connected: true, unconfirmed: 0 });
        expect(nodes.some(({ adapter }) => errors.get(adapter)?.length)).toBe(true);
      }, 15_000);
      over.resolve();
      const [ofA, ofB] = await counted;
      await eventually(() => expect(numbers(bob, "a").at(-1)).toBe(ofA - 1), 15_000);
      await eventually(() => expect(numbers(cat, "a").at(-1)).toBe(ofA - 1), 15_000);
      await eventually(() => expect(numbers(cat, "b").at(-1)).toBe(ofB - 1), 15_000);
      expect(numbers(bob, "a")).toEqual(upTo(ofA));
      expect(numbers(cat, "a")).toEqual(upTo(ofA));
      expect(numbers(cat, "b")).toEqual(upTo(ofB));
      const large = ({ heard }: Member) => heard.filter(([event]) => event === "large").length;
      expect(large(bob)).toBe(large(cat));
      for (const { adapter } of nodes) expect(adapter.stats.lost).toBe(0);
      nodes.forEach(errorsOf);
    },
    45_000,
  );

  test("longer than the journal says how many frames are lost, delivers the rest in order, and goes on", async () => {
    const { links, nodes, a, b, bob, cat } = await linked({ journal: { ms: 300 } });
    const over = Promise.withResolvers<void>();
    const counted = count(a, "a", over.promise);
    await eventually(() => expect(numbers(bob, "a").length).toBeGreaterThan(20));
    links[1]?.cut();
    await eventually(() => expect(numbers(cat, "a").length).toBeGreaterThan(150), 10_000);
    links[1]?.heal();
    await eventually(() => expect(b.adapter.stats.lost).toBeGreaterThan(0), 10_000);
    over.resolve();
    const ofA = await counted;
    await eventually(() => expect(numbers(bob, "a").at(-1)).toBe(ofA - 1), 10_000);
    const heard = numbers(bob, "a");
    expect(heard).toEqual([...new Set(heard)].toSorted((one, other) => Number(one) - Number(other)));
    expect(numbers(cat, "a")).toEqual(upTo(ofA));
    // A frame holds one number, or a few where this process was held up.
    expect(b.adapter.stats.lost).toBeLessThanOrEqual(ofA - heard.length);
    expect(errorsOf(b).join()).toMatch(new RegExp(`Lost up to ${b.adapter.stats.lost} frames of peer`));
    nodes.forEach(errorsOf);
  }, 45_000);

  test("of both, longer than the journal, drops what waited too long, delivers the rest, and counts no loss twice", async () => {
    const { links, nodes, a, b, bob } = await linked({ journal: { ms: 1_000 }, heartbeatInterval: 100 });
    a.io.to("red").emit("number", "a", 0);
    await received(bob.client, "number");
    links[0]?.cut();
    links[1]?.cut();
    await eventually(() => expect(a.adapter.stats.connected).toBe(false));
    for (let number = 1; number <= 10; number++) a.io.to(["red", `other${number}`]).emit("number", "a", number);
    await eventually(() => expect(a.adapter.stats.dropped).toBe(10), 3_000);
    a.io.to("red").emit("number", "a", 11);
    for (const link of links) link.heal();
    await eventually(() => expect(numbers(bob, "a")).toEqual([0, 11]), 10_000);
    await eventually(() => expect(errorsOf(a).join()).toContain("Dropped 10 packets"));
    expect(b.adapter.stats.lost).toBe(0); // they never had numbers
    nodes.forEach(errorsOf);
  });

  // What RabbitMQ does where nodes of a cluster lose touch, done to the first message to the room on its way to the broker.
  type Disorder = (publish: () => unknown, confirm: () => void) => (() => unknown) | void;
  const behindTheNext: Disorder = (publish) => publish;
  const toNobody: Disorder = (_, confirm) => void setTimeout(confirm, 20);
  test("of a cluster's nodes loses and reorders nothing, whatever becomes of a message", async () => {
    const strike = async (prefix: string, disorder: Disorder) => {
      let pending: (() => unknown) | void;
      let struck = false;
      const disorderly = tampered(({ key, send, confirm }) => {
        if (!struck && key.endsWith("other0")) {
          struck = true;
          pending = disorder(send, confirm);
          return;
        }
        send();
        pending?.();
        pending = undefined;
      });
      const [a, b] = await Promise.all([start({ prefix, amqpConnection: disorderly }), start({ prefix })]);
      await acquainted([a, b]);
      const bob = await join(b, ["red", "blue"]);
      a.io.to("blue").emit("number", 0);
      await received(bob.client, "number");
      await Bun.sleep(2_100); // what is unconfirmed right after a join may have been published before it
      a.io.to([...upTo(10).map((n) => `other${n}`), "red"]).emit("number", 1);
      await Bun.sleep(0); // each in a frame of its own
      a.io.to("blue").emit("number", 2);
      await Bun.sleep(0);
      a.io.to(["red", "blue"]).emit("number", 3);
      a.io.emit("number", 4);
      expect(await heardFrom(a.io, { bob })).toEqual({ bob: [0, 1, 2, 3, 4].map((number) => ["number", number]) });
      expect(struck).toBe(true);
      expect(b.adapter.stats.replayed).toBeGreaterThan(0);
      expect(b.adapter.stats.lost).toBe(0);
    };
    await Promise.all([strike(prefix, behindTheNext), strike(`${prefix}x`, toNobody)]);
  });

  const stuck: Record<string, (link: Proxy) => void> = {
    "is silent": (link) => link.silence("publishing"),
    "is away": (link) => link.cut("publishing"),
  };
  test.each(Object.entries(stuck))(
    "in which more is emitted than may wait, while the broker %s, keeps the newest and counts the others",
    async (_, strike) => {
      const { links, nodes, a, bob } = await linked({ maxQueued: 2 ** 20, heartbeatInterval: 500 });
      await bob.socket.join("blue");
      const [link] = links;
      if (!link) throw new Error("no link");
      strike(link);
      const text = "x".repeat(1_000);
      for (let number = 0; number < 5_000; number++) {
        a.io.to(number % 2 ? "blue" : "red").emit("number", "a", number, text);
        a.io.to(number % 2 ? "blue" : "red").volatile.emit("late", text);
        if (number % 100 === 0) await Bun.sleep(0);
      }
      expect(a.adapter.stats.queuedBytes).toBeLessThanOrEqual(2 ** 20);
      link.cut("publishing");
      link.heal();
      await eventually(() => expect(numbers(bob, "a").at(-1)).toBe(4_999), 10_000);
      const heard = numbers(bob, "a");
      const { dropped } = a.adapter.stats;
      expect(heard.length + dropped).toBe(5_000);
      expect(heard.slice(-100)).toEqual(upTo(5_000).slice(-100));
      await eventually(() => {
        const reported = (errors.get(a.adapter) ?? []).map(
          ({ message }) => /Dropped (\d+) packets that/.exec(message)?.[1],
        );
        expect(reported.reduce((sum, packets = "0") => sum + Number(packets), 0)).toBe(dropped);
      });
      nodes.forEach(errorsOf);
    },
    20_000,
  );

  test("gives a server nothing that was for another one alone", async () => {
    const { links, a, b, c } = await linked();
    const asked = spyOn(c.adapter, "onMessage");
    links[2]?.cut();
    for (let i = 0; i < 3; i++)
      await b.io
        .timeout(300)
        .fetchSockets()
        .catch(() => {});
    links[2]?.heal();
    await eventually(() => expect(c.adapter.stats.replayed).toBeGreaterThan(0), 5_000);
    a.io.serverSideEmit("last");
    await once(c.io, "last");
    expect(asked.mock.calls.map(([{ type }]) => type).filter((type) => type === "items")).toEqual([]);
    for (const node of [a, b, c]) errorsOf(node);
  });

  test("whose replay waits in the receiver's queue is not sent again and again", async () => {
    const waiting: (() => void)[] = [];
    let answers = 0;
    let questions = 0;
    const a = ({ content, again, send, confirm }: Passing) => {
      if (!again && !content.includes('"begin"')) return send();
      if (content.includes('"begin"')) answers++;
      waiting.push(send);
      queueMicrotask(confirm);
    };
    const b = ({ content, send }: Passing) => {
      if (content.includes('"ask"')) questions++;
      send();
    };
    const { linkB, emit, until } = await pair({ a, b });
    linkB.cut();
    await emit(1, 99);
    linkB.heal();
    await eventually(() => expect(questions).toBeGreaterThan(2), 10_000);
    for (const send of waiting) send();
    expect(await until(99)).toEqual(upTo(100));
    expect(answers).toBe(1);
  });

  test("of an emitter makes nobody send it packets again", async () => {
    const link = await Proxy.open(broker.port);
    const said: string[] = [];
    const pass = ({ content, send }: Passing) => {
      said.push(content.toString("latin1"));
      send();
    };
    const { a, cat, people } = await crew();
    const emitter = createEmitter({ prefix, amqpConnection: tampered(pass, link.port), onError: () => {} });
    closers.push(async () => {
      await emitter.close();
      link.close();
    });
    await emitter.ready;
    const uid = said[0]!.slice(2, 10);
    said.length = 0;
    const hello = { type: "hello", namespaces: [], revision: 1, reply: true, number: 0, floor: 0, shared: {} };
    await publish(`${prefix}#keys`, `@${uid}`, control("somebody", JSON.stringify(hello)));
    await eventually(() => expect(said.join()).toContain('"hello"')); // what the servers answered has come before
    await publish(`${prefix}#keys`, `@${uid}`, control("somebody", JSON.stringify({ type: "bye", number: 0 })));
    said.length = 0;
    link.cut();
    for (let i = 0; i < 10; i++) a.io.emit("hello");
    await heardFrom(a.io, people);
    link.heal();
    await eventually(() => expect(said.join()).toContain('"hello"'), 10_000);
    emitter.emit("hello");
    await eventually(() => expect(cat.heard).toEqual([["hello"]]));
    expect(said.filter((text) => text.includes('"ask"'))).toEqual([]);
  });

  test("at the start loses nothing of what the servers emit until the broker is there", async () => {
    const links = await Promise.all([Proxy.open(broker.port), Proxy.open(broker.port)]);
    const early = await start();
    const outsider = await join(early, ["red"]);
    for (let n = 0; n < 3; n++) early.io.to("red").emit("n", "too early");
    await eventually(() => expect(early.adapter.stats.unconfirmed).toBe(0));
    await Bun.sleep(50);
    for (const link of links) link.cut();
    const [a, b] = await Promise.all(
      links.map(({ port }) => start({ amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${port}`) })),
    );
    const [near, far] = [a!, b!];
    await Promise.all([once(near.adapter, "error"), once(far.adapter, "error")]);
    const bob = await join(far, ["red"]);
    for (let n = 0; n < 3; n++) near.io.to("red").emit("n", n);
    links[0]?.heal();
    await near.adapter.ready;
    await eventually(() => expect(near.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
    links[1]?.heal();
    await eventually(() => expect(bob.heard.map(([, n]) => n)).toEqual([0, 1, 2]), 4_000);
    expect(outsider.heard.map(([, n]) => n).slice(-3)).toEqual([0, 1, 2]);
    await Promise.all([near.adapter.close(), far.adapter.close()]);
    for (const link of links) link.close();
    for (const node of [early, near, far]) errorsOf(node);
  });

  test("and another one right after it lose nothing of a server that began to send during the first", async () => {
    const link = await Proxy.open(broker.port);
    const a = await start({ amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`) });
    const bob = await join(a);
    const cut = async () => {
      link.cut();
      await eventually(() => expect(a.adapter.stats.connected).toBe(false));
    };
    await cut();
    const asked = Promise.withResolvers<void>();
    let answers = 0;
    const losingTheFirstAnswer: Pass = ({ content, send, confirm }) => {
      if (!content.includes('"begin"') || ++answers > 1) return send();
      confirm();
      asked.resolve();
    };
    const b = await start({ amqpConnection: tampered(losingTheFirstAnswer) });
    await b.adapter.ready;
    b.io.emit("n", 0);
    await eventually(() => expect(b.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0, framesSent: 1 }));
    link.heal();
    await asked.promise;
    await cut();
    b.io.emit("n", 1);
    link.heal();
    await eventually(() => expect(bob.heard.map(([, n]) => n)).toEqual([0, 1]), 4_000);
    await a.adapter.close();
    link.close();
    errorsOf(a);
  });

  test("after which a sender closes before the others are back loses nothing", async () => {
    const links = await Promise.all([Proxy.open(broker.port), Proxy.open(broker.port)]);
    const [near, far] = links.map(
      ({ port }) =>
        () =>
          connect(`amqp://guest:guest@127.0.0.1:${port}`),
    );
    const b = await start({ amqpConnection: far! });
    const emitter = createEmitter({ amqpConnection: near!, prefix, onError: () => {} });
    await Promise.all([b.adapter.ready, emitter.ready]);
    const bob = await join(b, ["red"]);
    emitter.to("red").emit("n", 0);
    await received(bob.client, "n");
    for (const link of links) link.cut();
    emitter.to("red").emit("n", 1);
    links[0]?.heal();
    const closed = emitter.close();
    const last = received(bob.client, "n");
    await Bun.sleep(500);
    links[1]?.heal();
    await closed;
    expect(await last).toEqual([1]);
    await b.adapter.close();
    for (const link of links) link.close();
    errorsOf(b);
  });

  test("in which a server closes loses nothing that it emits until then", async () => {
    const link = await Proxy.open(broker.port);
    const { people } = await crew();
    const d = await start({ amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`) });
    await d.adapter.ready;
    link.cut();
    await eventually(() => expect(d.adapter.stats.connected).toBe(false));
    d.io.to("red").emit("n", 1);
    const arrived = received(people.bob.client, "n");
    const closed = d.io.close();
    link.heal();
    await closed;
    expect(await arrived).toEqual([1]);
    link.close();
    expect(errorsOf(d).join()).not.toContain("confirmed");
  });

  test("whose sender closes while it replays loses nothing", async () => {
    const asked = Promise.withResolvers<void>();
    const { a, b, until } = await missed(500, ({ content, send }) => {
      send();
      if (content.includes('"begin"')) asked.resolve();
    });
    await asked.promise;
    await a.adapter.close();
    expect(await until(499)).toEqual(upTo(500));
    expect(b.adapter.stats.lost).toBe(0);
    expect(errorsOf(b).join()).not.toContain("may be lost");
  });
});

describe("a simulation of senders and receivers", () => {
  /** A frame, and the numbers of its packets, which are negative for volatile ones. */
  type Frame = ReturnType<typeof readFrame> & { readonly contents: readonly number[] };
  /** What a sender says of itself; JSON, where a frame begins with its version. */
  type Control =
    | { type: "beat"; number: number; floor: number }
    | { type: "begin"; id: number; from: number; to: number }
    | { type: "bye"; number: number };
  /** What the broker passes on. */
  interface Message {
    readonly keys: readonly string[];
    readonly again: boolean;
    readonly content: Frame | Control;
    readonly confirmed: () => void;
  }

  /** Times in ms, and sizes that make the limits rare enough but not too rare. */
  const ASK_AGAIN = 30;
  const ANSWER_AGAIN = 60;
  const SILENCE = 400;
  const ROOMS = 10;

  /** Numbers from a seed (mulberry32), so that a schedule that fails can be run again. */
  class Random {
    #state: number;
    constructor(seed: number) {
      this.#state = seed;
    }
    next(): number {
      this.#state = (this.#state + 0x6d2b79f5) | 0;
      let t = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
    }
    readonly chance = (p: number): boolean => this.next() < p;
    readonly below = (n: number): number => Math.floor(this.next() * n);
    readonly pick = <T>(...values: [T, ...T[]]): T => values[this.below(values.length)] ?? values[0];
  }

  const isFrame = (content: Frame | Control): content is Frame => "body" in content;

  function decode(body: Buffer): Frame {
    const frame = readFrame(body);
    const packets = readSections(frame).sections.flatMap(takePackets);
    return { ...frame, contents: packets.map(([text]) => parseInt(String(text))) };
  }

  class Sender {
    readonly publisher: Publisher;
    up = false;
    closed = false;
    /** Published, but not routed yet; routed, but the confirm is still under way. */
    readonly wire: Message[] = [];
    readonly confirms: (() => void)[] = [];
    /** The rooms of each packet; in which connection a volatile one was emitted; what is in each numbered frame. */
    readonly rooms = new Map<number, number[]>();
    readonly #emittedIn = new Map<number, number>();
    readonly frames = new Map<number, readonly number[]>();
    emitted = 0;
    dropped = 0;
    /** Packets of frames that were given up: too large, or too old to be published once more, which are dropped as well. */
    readonly refused = new Set<number>();
    tooOld = 0;
    #volatiles = 0;
    /** Large packets, now and then: a short log forgets them, and only so many bytes are under way at once. */
    readonly #maxLength: number;
    #connection = 0;
    #flushAt = Infinity;
    readonly #routes = new Routes("/", false);
    /** As in `Sender`: the latest question of each receiver and how far its answer is. */
    readonly #answers = new Map<
      Receiver,
      { id: number; after: number | undefined; at: number; next: number; to: number }
    >();
    readonly world: World;

    constructor(world: World) {
      this.world = world;
      const { chance, pick } = world.random;
      this.#maxLength = chance(0.03) ? 50_000 : 200;
      const journal = { bytes: pick(1, 4_096, 2 ** 20, 2 ** 20), ms: pick(60, 1e9, 1e9) };
      const [servers, several] = [pick(1, 20), chance(0.5)];
      this.publisher = new Publisher(
        "sender--",
        { maxQueued: pick(8_000, 1e9, 1e9), maxPayload: pick(2_000, 2 ** 20), journal },
        { servers: () => servers, maxKeyBytes: () => (several ? 200 : 0) },
        {
          dropped: (packets) => (this.dropped += packets),
          flushIn: (ms) => (this.#flushAt = Math.min(this.#flushAt, world.now + ms)),
        },
        () => world.now,
      );
      this.heal();
    }

    emit(): void {
      const { chance, below, pick } = this.world.random;
      const volatile = chance(0.1);
      const n = volatile ? -++this.#volatiles : ++this.emitted;
      const rooms = Array.from({ length: pick(0, 1, 1, 1, 2) }, () => below(ROOMS));
      this.rooms.set(n, rooms);
      if (volatile) this.#emittedIn.set(n, this.#connection);
      const opts = { rooms: new Set(rooms.map((room) => `room${room}`)), ...(volatile && { flags: { volatile } }) };
      const text = `${n} ${"x".repeat(below(this.#maxLength))}`;
      this.publisher.add(this.#routes.packets(opts), [text], text.length);
    }

    beat(): void {
      const { number, floor } = this.publisher;
      this.say("@", { type: "beat", number, floor });
    }

    say(key: string, control: Control): void {
      void this.publisher.sendNow(key, Buffer.from(JSON.stringify(control)));
    }

    heal(): void {
      if (this.up || this.closed) return;
      this.up = true;
      this.#connection++;
      this.publisher.up(({ keys, body, again = false }, outcome) => {
        const content =
          body[0] === "{".charCodeAt(0) ? (JSON.parse(String(body)) as Control) : decode(Buffer.from(body));
        if (isFrame(content)) this.#publish(content, again);
        this.wire.push({ keys, again, content, confirmed: () => outcome("taken") });
      });
    }

    /** What the broker has not got yet is lost, now and then because it was too large. Old confirms say nothing any more. */
    cut(): void {
      if (!this.up) return;
      this.up = false;
      this.wire.length -= this.world.random.below(Math.min(this.wire.length, 5) + 1);
      this.#answers.clear();
      if (this.world.random.chance(0.1)) this.publisher.giveUpLargest();
      for (let number = this.publisher.floor + 1; number <= this.publisher.number; number++) {
        const body = this.publisher.log.get(number);
        if (!body || decode(body).contents.length > 0) continue;
        for (const n of this.frames.get(number) ?? []) this.refused.add(n);
      }
      this.publisher.down();
    }

    /** Sends a goodbye after its last frame. */
    close(): void {
      if (!this.up || this.publisher.batcher.size > 0) return;
      this.say("@", { type: "bye", number: this.publisher.number });
      this.closed = true;
      this.#answers.clear();
    }

    tick(): void {
      if (this.#flushAt <= this.world.now) this.#flushAt = Infinity;
      this.publisher.flush();
      for (const [receiver, answer] of this.#answers)
        for (let i = this.world.random.below(6); i > 0 && answer.next <= answer.to; i--) {
          const body = this.publisher.log.get(answer.next++);
          if (body) void this.publisher.sendNow(receiver.key, body, true);
          else answer.next = Infinity; // it asks again
        }
    }

    /** As `Sender.replay()` does: the same question again is one whose answer is under way, unless that takes too long. */
    answer(receiver: Receiver, id: number, after: number | undefined): void {
      if (!this.up || this.closed) return;
      const { publisher, world } = this;
      const latest = this.#answers.get(receiver);
      if (latest?.id === id && latest.after === after && world.now - latest.at < ANSWER_AGAIN) return;
      publisher.expire();
      const [from, to] = [Math.max((after ?? 0) + 1, publisher.log.first), publisher.number];
      this.say(receiver.key, { type: "begin", id, from, to });
      this.#answers.set(receiver, { id, after, at: world.now, next: from, to });
    }

    #publish({ number, contents }: Frame, again: boolean): void {
      if (number > 0) {
        const before = this.frames.get(number) ?? [];
        if (before.length === 0) this.frames.set(number, contents);
        if (contents.length > 0) return;
        this.tooOld += before.filter((n) => !this.refused.has(n)).length;
        for (const n of before) this.refused.add(n);
        return;
      }
      const isFresh = contents.every((n) => this.#emittedIn.get(n) === this.#connection);
      this.world.check("a volatile packet waits for no connection, and is not replayed", isFresh && !again);
    }
  }

  /** What a receiver has of a sender: its stream, and what the simulation knows of it. */
  class Inbound {
    readonly stream: PeerStream<Frame>;
    askAt = 0;
    /** When the sender's last word came. */
    heardAt: number;
    /** Numbers of frames that were delivered; packets for this receiver, and volatile ones, in the order in which they came. */
    readonly delivered = new Set<number>();
    readonly heard: number[] = [];
    readonly volatile: number[] = [];
    /** Numbers that the sender had forgotten when it was asked, or that nobody can ask for any more. */
    readonly lost = new Set<number>();
    #reported = 0;
    /** The first number that was published after the receiver's first queue was there. */
    readonly first: number;
    readonly sender: Sender;

    constructor(sender: Sender, receiver: Receiver) {
      const { world } = sender;
      this.sender = sender;
      this.heardAt = world.now;
      this.first = receiver.promised.get(sender) ?? 1;
      const deliver = ({ number, contents }: Frame): void => {
        if (number > 0) {
          world.check("a frame comes once, or is lost", !this.delivered.has(number) && !this.lost.has(number));
          this.delivered.add(number);
        } else world.check("no volatile packet comes while frames may be missing", !this.stream.catchUp);
        for (const n of contents)
          if (receiver.wants(sender.rooms.get(n) ?? [])) (n < 0 ? this.volatile : this.heard).push(n);
      };
      const lost = (frames: number): void => void (this.#reported += frames);
      const events = { deliver, lost, replayed: () => {}, duplicate: () => {} };
      this.stream = new PeerStream<Frame>(events, world.random.pick(500, 3_000, 1e9, 1e9));
    }

    begin(from: number, to: number): void {
      const { cursor, catchUp } = this.stream;
      const reported = this.#reported;
      // What a sender published before it was heard for the first time cannot be known to be lost.
      const after = cursor ?? Math.min(from, ...(catchUp?.held.keys() ?? [])) - 1;
      this.stream.begin(from, to);
      if (cursor === undefined) this.#miss(0, after);
      const lost = this.#miss(after, from - 1);
      this.sender.world.check("as many frames are reported as are lost", this.#reported - reported === lost);
    }

    /** The sender has said goodbye after this number, or its queue is gone. */
    giveUp(last?: number): void {
      const { catchUp, cursor } = this.stream;
      const missing = this.stream.giveUp(last);
      if (!catchUp) return;
      const lost = this.#miss(cursor ?? 0, this.sender.publisher.number);
      if (last !== undefined && cursor !== undefined)
        this.sender.world.check("as many frames are given up as are missing", missing === lost);
    }

    #miss(after: number, last: number): number {
      const { size } = this.lost;
      for (let number = after + 1; number <= last; number++) if (!this.delivered.has(number)) this.lost.add(number);
      return this.lost.size - size;
    }
  }

  class Receiver {
    readonly key: string;
    readonly #keys: Set<string>;
    readonly #digests: Set<number>;
    readonly #rooms: Set<number>;
    /** What the broker has for it; undefined while its queue is gone. */
    queue: { readonly sender: Sender; readonly message: Message }[] | undefined;
    /** Per sender, the first number that was published after the first queue was there. */
    readonly promised = new Map<Sender, number>();
    readonly inbound = new Map<Sender, Inbound>();
    #wasAway = false;
    readonly #world: World;

    constructor(world: World, index: number) {
      this.#world = world;
      this.key = `@${index}`;
      const { chance } = world.random;
      const everything = chance(0.3);
      this.#rooms = new Set(Array.from({ length: ROOMS }, (_, room) => room).filter(() => everything || chance(0.5)));
      this.#keys = new Set(["@", this.key, "/", ...[...this.#rooms].map((room) => `/#room${room}`)]);
      this.#digests = new Set(
        [...this.#keys].map((key) => ((Bun.hash.crc32(key) | 1) >>> 0) - Number(key.startsWith("@"))),
      );
    }

    wants = (rooms: number[]): boolean => rooms.length === 0 || rooms.some((room) => this.#rooms.has(room));
    isBound = ({ keys }: Message): boolean => keys.some((key) => this.#keys.has(key));
    predecessors = (frame: Frame, hasNot: (number: number) => boolean = () => true): readonly number[] =>
      predecessorsOf(frame, (digest) => this.#digests.has(digest), hasNot);

    heal(): void {
      if (this.queue) return;
      this.queue = [];
      for (const sender of this.#world.senders)
        if (!this.#wasAway) this.promised.set(sender, sender.publisher.number + 1);
      for (const inbound of this.inbound.values()) {
        inbound.stream.startCatchUp();
        inbound.askAt = 0;
      }
    }

    /** The queue goes with what it holds. */
    cut(): void {
      if (!this.queue) return;
      this.queue = undefined;
      this.#wasAway = true;
    }

    /** As `Inbox` does: who is heard for the first time may have begun during an outage. */
    #hear(sender: Sender): Inbound {
      let inbound = this.inbound.get(sender);
      if (!inbound) {
        this.inbound.set(sender, (inbound = new Inbound(sender, this)));
        if (this.#wasAway) inbound.stream.startCatchUp();
      }
      inbound.heardAt = this.#world.now;
      return inbound;
    }

    /** As `Inbox` does. */
    receive(): void {
      const next = this.queue?.shift();
      if (!next) return;
      const { sender, message } = next;
      const { content, again } = message;
      const inbound = this.#hear(sender);
      const { stream } = inbound;
      if (isFrame(content)) {
        if (!again) return stream.receive(content, this.predecessors(content, stream.hasNot));
        const isNext = stream.receiveAgain(content);
        if (!isNext) stream.startCatchUp();
        inbound.askAt = isNext ? this.#world.now + ASK_AGAIN : 0;
      } else if (content.type === "beat") stream.hears(content.number, content.floor);
      else if (content.type === "bye") inbound.giveUp(content.number);
      else if (stream.catchUp?.id === content.id) {
        inbound.askAt = this.#world.now + ASK_AGAIN;
        inbound.begin(content.from, content.to);
      }
    }

    /** As `Membership` does; some questions get lost. A sender that has closed does not answer. */
    ask(): void {
      const { now, random } = this.#world;
      if (!this.queue) return;
      for (const [sender, inbound] of this.inbound) {
        const { catchUp, cursor } = inbound.stream;
        if (!catchUp || inbound.askAt > now) continue;
        inbound.askAt = now + ASK_AGAIN;
        if (sender.closed && now - inbound.heardAt > SILENCE) inbound.giveUp();
        else if (random.chance(0.9)) sender.answer(this, catchUp.id, cursor);
      }
    }
  }

  class World {
    now = 0;
    readonly random: Random;
    readonly senders: Sender[] = [];
    readonly receivers: Receiver[] = [];
    readonly #seed: number;

    constructor(seed: number) {
      this.#seed = seed;
      this.random = new Random(seed);
      const { chance, pick } = this.random;
      for (let i = pick(1, 1, 2); i > 0; i--) this.senders.push(new Sender(this));
      for (let i = pick(1, 1, 2); i > 0; i--) this.receivers.push(new Receiver(this, i));
      for (const receiver of this.receivers) if (chance(0.8)) receiver.heal();
    }

    check(what: string, holds: boolean): void {
      if (!holds) throw new Error(`SEED=${this.#seed}: ${what}`);
    }

    /** The broker gives a message to the queues that it is for. */
    #route(sender: Sender, message: Message, except?: Receiver): void {
      const isNumbered = isFrame(message.content) && message.content.number > 0;
      for (const receiver of this.receivers) {
        if (receiver === except || !receiver.isBound(message)) continue;
        if (message.again && this.random.chance(0.01)) continue; // a replay that loses a frame
        receiver.queue?.push({ sender, message });
        if (isNumbered && this.random.chance(0.01)) receiver.queue?.push({ sender, message });
      }
      sender.confirms.push(message.confirmed);
    }

    /** Nodes of a cluster lose touch: one queue gets some frames late or never, as a frame behind them tells. */
    #scramble(sender: Sender): void {
      const { chance, below, pick } = this.random;
      const count = 1 + below(3);
      const receiver = pick(this.receivers[0]!, ...this.receivers);
      const early = sender.wire.slice(0, count);
      const last = sender.wire[count];
      if (!last || !isFrame(last.content) || receiver.inbound.get(sender)?.stream.cursor === undefined) return;
      if (![...early, last].every((message) => !message.again && receiver.isBound(message))) return;
      const told = receiver.predecessors(last.content);
      if (!early.every(({ content }) => isFrame(content) && told.includes(content.number))) return;
      sender.wire.splice(0, count + 1);
      for (const message of early) this.#route(sender, message, receiver);
      this.#route(sender, last);
      for (const message of early) if (chance(0.5)) receiver.queue?.push({ sender, message });
    }

    /** Time passes; each part gets on with a part of what it has to do, or in the end with all of it. */
    #work(ms: number, part: (of: number) => number): void {
      this.now += ms;
      for (const sender of this.senders) {
        if (!sender.closed) sender.tick();
        for (const message of sender.wire.splice(0, part(sender.wire.length))) this.#route(sender, message);
        for (const confirm of sender.confirms.splice(0, part(sender.confirms.length))) confirm();
      }
      for (const receiver of this.receivers) {
        for (let i = part(receiver.queue?.length ?? 0); i > 0; i--) receiver.receive();
        receiver.ask();
      }
    }

    step(): void {
      const { chance, below } = this.random;
      for (const sender of this.senders) {
        if (sender.closed) continue;
        for (let i = chance(0.4) ? below(6) : 0; i > 0; i--) sender.emit();
        if (chance(0.1)) sender.beat();
        if (chance(0.05)) sender.publisher.block(chance(0.5));
        if (chance(0.1)) this.#scramble(sender);
        if (chance(0.05)) sender.cut();
        else if (chance(0.3)) sender.heal();
        if (chance(0.002)) sender.close();
      }
      for (const receiver of this.receivers)
        if (chance(0.05)) receiver.cut();
        else if (chance(0.3)) receiver.heal();
      this.#work(below(15), (of) => below(of + 1));
    }

    /** All connections stay up from here on, until nothing is left to do. */
    settle(): void {
      for (const receiver of this.receivers) receiver.heal();
      for (const sender of this.senders) {
        sender.heal();
        sender.publisher.block(false);
        if (!sender.closed) sender.beat();
      }
      const isBusy = () =>
        this.senders.some(
          ({ publisher, wire, closed }) => wire.length > 0 || (!closed && publisher.unconfirmedPackets > 0),
        ) ||
        this.receivers.some(
          ({ queue, inbound }) => queue?.length || [...inbound.values()].some(({ stream }) => stream.catchUp),
        );
      for (let i = 0; i < 500 && isBusy(); i++) this.#work(20, (of) => of);
      this.check("it comes to rest", !isBusy());
    }

    verify(): void {
      const inOrder = (numbers: number[]) =>
        numbers.every((n, i) => i === 0 || Math.abs(n) > Math.abs(numbers[i - 1] ?? 0));
      for (const sender of this.senders) {
        const { publisher, frames, emitted, dropped, tooOld, closed } = sender;
        const published = [...frames.values()].flat();
        this.check("packets are published in order, once", inOrder(published));
        this.check("packets are published, or reported as dropped", published.length + dropped - tooOld === emitted);
        this.check("nothing is left in the batcher", publisher.batcher.bytes === 0 && publisher.batcher.size === 0);
        this.check("all is confirmed", closed || publisher.floor === publisher.number);
        for (const receiver of this.receivers) {
          const inbound = receiver.inbound.get(sender);
          if (!inbound && closed) continue; // it came and went during an outage
          const { heard = [], volatile = [], lost = new Set<number>() } = inbound ?? {};
          this.check("packets come in order, once", inOrder(heard) && inOrder(volatile));
          const got = new Set(heard);
          for (const [number, packets] of frames)
            for (const n of packets)
              if (number >= (receiver.promised.get(sender) ?? Infinity) && receiver.wants(sender.rooms.get(n) ?? []))
                this.check(
                  "a packet comes, or is reported as lost",
                  got.has(n) || lost.has(number) || sender.refused.has(n),
                );
        }
      }
    }
  }

  test("loses, doubles and reorders nothing in ten thousand schedules", async () => {
    const { SEED, SCHEDULES = SEED ? 1 : 10_000 } = process.env;
    const base = Number(SEED ?? Math.floor(Math.random() * 2 ** 31));
    for (let i = 0; i < Number(SCHEDULES); i++) {
      const world = new World(base + i);
      for (let steps = 15 + world.random.below(50); steps > 0; steps--) world.step();
      world.settle();
      world.verify();
      await Promise.all(world.senders.map(({ closed, publisher }) => closed || publisher.drained()));
    }
  }, 60_000);
});

describe("a stream", () => {
  test("gives nothing again that has come, though a heartbeat from before it comes late", () => {
    const delivered: number[] = [];
    const deliver = ({ number }: ReturnType<typeof readFrame>) => void delivered.push(number);
    const stream = new PeerStream({ deliver, replayed() {}, duplicate() {}, lost() {} }, 1e6);
    const frame = (number: number) => ({
      kind: 1,
      sender: "sender--",
      number,
      floor: 0,
      packets: 1,
      body: Buffer.of(),
    });
    for (const number of [1, 2, 3, 4]) stream.receive(frame(number));
    stream.hears(2, 0);
    for (const number of [3, 4, 5]) stream.receive(frame(number));
    expect(delivered).toEqual([1, 2, 3, 4, 5]);
  });
});

describe("a publisher", () => {
  const limits = { maxQueued: 1e9, maxPayload: 2 ** 24, journal: { bytes: 2 ** 24, ms: 60_000 } };
  const facts = { servers: () => 3, maxKeyBytes: () => 1e5 };
  const routes = new Routes("/", false);
  const emit = (publisher: Publisher, room: string, text = "", volatile = false) => {
    const flags = volatile ? { volatile } : {};
    publisher.add(routes.packets({ rooms: new Set([room]), flags }), [text], text.length);
    publisher.flush();
  };

  test("names the unconfirmed frames before a frame, whatever volatile ones are between", () => {
    let now = 0;
    const publisher = new Publisher("sender--", limits, facts, { dropped() {}, flushIn() {} }, () => (now += 20));
    const bodies: Buffer[] = [];
    publisher.up(({ body }) => bodies.push(Buffer.from(body)));
    emit(publisher, "red");
    for (let i = 0; i < 10; i++) emit(publisher, `room${i}`, "", true);
    emit(publisher, "blue");
    const isTrue = () => true;
    expect(predecessorsOf(readFrame(bodies.at(-1)!), isTrue, isTrue)).toEqual([1]);
  });

  test("counts what is unconfirmed once, though a connection is lost as soon as it is there", () => {
    const publisher = new Publisher("sender--", limits, facts, { dropped() {}, flushIn() {} });
    publisher.up(() => {});
    for (let i = 0; i < 20; i++) emit(publisher, "red", "x".repeat(60_000));
    publisher.down();
    publisher.up((_, confirmed) => confirmed("lost"));
    const confirms: (() => void)[] = [];
    publisher.up((_, confirmed) => confirms.push(() => confirmed("taken")));
    for (let confirm = confirms.shift(); confirm; confirm = confirms.shift()) confirm();
    expect([publisher.unconfirmed, publisher.batcher.size]).toEqual([0, 0]);
  });

  test("sends a room's packets to everyone while a join of others' sockets may wait, and shortly after", () => {
    let since: number | undefined;
    const ours = new Routes("/", false, () => since);
    const keysAfter = (ms: number) => {
      now.mockReturnValue(start + ms);
      return ours.packets({ rooms: new Set(["red"]) }).keys;
    };
    const start = performance.now();
    const now = spyOn(performance, "now");
    try {
      ours.joinFromAfar(["red"]);
      expect(keysAfter(15_000)).toEqual(["/"]); // the broker is away
      since = start + 20_000;
      expect(keysAfter(29_000)).toEqual(["/"]);
      expect(keysAfter(31_000)).toEqual(["/#red"]);
    } finally {
      now.mockRestore();
    }
  });

  test("is drained once what waited is dropped", async () => {
    let now = 0;
    const publisher = new Publisher("sender--", limits, facts, { dropped() {}, flushIn() {} }, () => now);
    emit(publisher, "red");
    const drained = publisher.drained();
    now = 60_001;
    publisher.expire();
    await drained;
  });

  test("publishes no packets again that are older than the journal, for peers may have forgotten that they have them", () => {
    let now = 0;
    let dropped = 0;
    const events = { dropped: (packets: number) => void (dropped += packets), flushIn() {} };
    const publisher = new Publisher("sender--", limits, facts, events, () => now);
    publisher.up(() => {});
    emit(publisher, "red");
    now = 60_001;
    publisher.down();
    const frames: ReturnType<typeof readFrame>[] = [];
    publisher.up(({ body }) => frames.push(readFrame(Buffer.from(body))));
    now += 20;
    emit(publisher, "red");
    expect(frames.map(({ number, packets }) => [number, packets])).toEqual([
      [1, 0],
      [2, 1],
    ]);
    expect(dropped).toBe(1);
  });
});

describe("an adapter", () => {
  test("starts by itself: Socket.IO starts none before 4.8.2", async () => {
    const { io } = await host();
    const adapter = createAdapter({ amqpConnection, prefix })(io.of("/alone"));
    closers.push(() => adapter.close());
    await adapter.ready;
  });

  test("that takes the place of one from another copy of the module closes it", async () => {
    const [a, b] = await cluster();
    const copy = `${import.meta.dir}/.copy-${process.pid}.ts`;
    await Bun.write(copy, Bun.file(`${import.meta.dir}/index.ts`));
    closers.push(() => Bun.file(copy).delete());
    const again: typeof import("./index") = await import(copy);
    a.io.adapter(again.createAdapter({ amqpConnection, prefix }));
    const { adapter } = a.io.of("/");
    if (!(adapter instanceof again.AmqpAdapter)) throw new Error("not replaced");
    await adapter.ready;
    await eventually(async () => expect(await b.adapter.serverCount()).toBe(3));
    await eventually(async () => expect(await queues()).toHaveLength(3));
  });

  test("is ready when init() resolves, also the second time, and has a name in the cluster", async () => {
    const node = await start();
    await node.adapter.init();
    expect(node.adapter.stats.connected).toBe(true);
    await node.adapter.init();
    expect((await queues()).map(({ name }) => name)).toEqual([expect.stringContaining(node.adapter.uid)]);
  });

  test("knows the other servers when it is ready", async () => {
    const { people } = await crew();
    const d = await start();
    await d.adapter.ready;
    expect(await d.adapter.serverCount()).toBe(4);
    expect(await d.io.fetchSockets()).toHaveLength(3);
    expect(await d.io.timeout(2_000).emitWithAck("name?")).toHaveLength(Object.keys(people).length);
  });

  test("says which connection comes and goes", async () => {
    const node = await start();
    const said: string[] = [];
    for (const event of ["connect", "disconnect"])
      node.adapter.on(event, (connection: string) => said.push(`${event} ${connection}`));
    await node.adapter.ready;
    const link = once(node.adapter, "disconnect");
    await closeConnections();
    await link;
    await eventually(() => expect(said.filter((line) => line === "connect consuming")).toHaveLength(2), 5_000);
    expect(new Set(said)).toEqual(
      new Set(["connect consuming", "connect publishing", "disconnect consuming", "disconnect publishing"]),
    );
    errorsOf(node);
  }, 20_000);

  test("whose namespace a client opens lets it hear what others emit from then on", async () => {
    const [a, b] = await cluster(undefined, { cleanupEmptyChildNamespaces: true });
    for (const { io } of [a, b]) io.of(/^\/dynamic-\d+$/);
    for (let i = 0; i < 20; i++) {
      const { client } = await join(b, [], `/dynamic-${i}`);
      const hello = received(client, "hello");
      a.io.of(`/dynamic-${i}`).emit("hello"); // which a has not open either
      await hello;
      client.disconnect();
    }
  });

  test("reports settings that differ from a peer's, once, with both values", async () => {
    const [a, b] = await Promise.all([start(), start({ journal: { ms: 30_000 } })]);
    await acquainted([a, b]);
    for (const [node, here, there] of [
      [a, 60_000, 30_000],
      [b, 30_000, 60_000],
    ] as const)
      await eventually(() => {
        const said = errors.get(node.adapter)?.map(String) ?? [];
        expect(said).toEqual([expect.stringContaining(`journal.ms is ${here} here and ${there} on peer`)]);
      });
    [a, b].forEach(errorsOf);
  });

  test("reports an emitter with another parser, as the emitter does", async () => {
    const a = await start();
    await a.adapter.ready;
    const reported = Promise.withResolvers<Error>();
    const emitter = createEmitter({ amqpConnection, prefix, parser: msgpack, onError: reported.resolve });
    closers.push(() => emitter.close());
    expect((await reported.promise).message).toMatch(/^parser is ".*" here and "2\[\\"name\\"\]" on peer/s);
    await eventually(() => expect(errors.get(a.adapter)).toHaveLength(1));
    expect(errorsOf(a)).toEqual([expect.stringMatching(/parser is "2\[\\"name\\"\]" here and/)]);
  });

  test("works with a parser that takes only the events it knows, and encodes each time in another way", async () => {
    const events = ["n", "end"];
    class Encoder extends msgpack.Encoder {
      #packets = 0;
      override encode(packet: Parameters<msgpack.Encoder["encode"]>[0]) {
        const [event] = Array.isArray(packet.data) ? packet.data : [];
        if (packet.type === 2 && !events.includes(event)) throw new TypeError(`there is no event ${event}`);
        return super.encode({ ...packet, packets: ++this.#packets } as typeof packet);
      }
    }
    const parser = { ...msgpack, Encoder };
    const { a, people } = await crew({}, { parser, connectionStateRecovery: {} }, { parser: msgpack });
    a.io.emit("n", 1);
    const heard = await heardFrom(a.io, people);
    expect(Object.values(heard).map(([event]) => event?.slice(0, 2))).toEqual(Array(3).fill(["n", 1]));
  });

  test("whose errors nobody listens to warns the process, once per kind", async () => {
    const program = child(`
      process.on("warning", ({ name, message }) => console.log(name, message));
      const { createServer } = await import("node:net");
      const io = new Server(0, { serveClient: false, adapter: createAdapter({ prefix, amqpConnection: () => connect("amqp://127.0.0.1:1") }) });
      setTimeout(() => io.close(), 800);`);
    const lines = (await program.stdout.text()).split("\n").filter((line) => line.startsWith("SocketIoAmqp"));
    expect(lines.map((line) => /consuming|publishing/.exec(line)?.[0]).toSorted()).toEqual(["consuming", "publishing"]);
  });

  test("warns once of foreign messages that it cannot read", async () => {
    const program = child(`
      process.on("warning", ({ name, message }) => console.log(name, message));
      ${A_SERVER}
      console.log("ready");
      io.on("bye", () => io.close());`);
    const output: string[] = [];
    for await (const text of program.stdout.pipeThrough(new TextDecoderStream())) {
      output.push(text);
      if (!text.includes("ready")) continue;
      for (let i = 0; i < 3; i++) await publish(prefix, "/", `"message ${"i".repeat(i)}"`, JSON_TYPE);
      const emitter = createEmitter({ amqpConnection, prefix });
      emitter.serverSideEmit("bye");
      await emitter.close();
    }
    const lines = output.join("").split("\n");
    expect(lines.filter((line) => line.startsWith("SocketIoAmqp"))).toHaveLength(1);
  });

  test("warns once of several peers with the same difference", async () => {
    const nodes = await Promise.all([start(), start()]);
    const program = child(`
      process.on("warning", ({ name, message }) => console.log(name, message));
      const journal = { ms: 30_000 };
      const io = new Server(0, { serveClient: false, adapter: createAdapter({ amqpConnection, prefix, journal }) });
      await io.of("/").adapter.ready;
      while (await io.of("/").adapter.serverCount() < 3) await Bun.sleep(20);
      await io.close();`);
    const lines = (await program.stdout.text()).split("\n").filter((line) => line.startsWith("SocketIoAmqp"));
    expect(lines).toEqual([expect.stringContaining("journal.ms is 30000 here and 60000 on peer")]);
    nodes.forEach(errorsOf);
  });

  test("forgets the answers that did not come to an acknowledged broadcast of another server", async () => {
    const [a, b] = await cluster();
    const { socket } = await join(b);
    await expect(a.io.timeout(100).emitWithAck("nobody answers")).rejects.toThrow();
    const { acks } = socket as unknown as { acks: Map<number, unknown> };
    expect(acks.size).toBe(1);
    await eventually(() => expect(acks.size).toBe(0), 3_000);
  });
});

describe("connection state recovery", () => {
  /** Servers that keep sessions. */
  const recovering = (options?: Options, server?: HostOptions) =>
    cluster({ requestsTimeout: 2_000, ...options }, { connectionStateRecovery: {}, ...server });

  /** A client that can be lost, and come back to any server. */
  class Guest {
    readonly client: ClientSocket;
    readonly heard: unknown[][] = [];
    readonly #nsp: string;

    constructor({ port }: { port: number }, nsp = "/", options: ClientOptions = {}) {
      this.#nsp = nsp;
      const url = `http://127.0.0.1:${port}`;
      this.client = new Manager(url, { transports: ["websocket"], reconnection: false, ...options }).socket(nsp);
      closers.unshift(() => this.client.disconnect());
      // Without the offset, which comes last.
      this.client.onAny((...event: unknown[]) => this.heard.push(event.slice(0, -1)));
    }

    static async at(host: Host, rooms: string[] = [], nsp = "/", options: ClientOptions = {}): Promise<Guest> {
      const guest = new Guest(host, nsp, options);
      await guest.connected();
      const socket = guest.on(host);
      await socket.join(rooms);
      const first = received(guest.client, "welcome");
      socket.emit("welcome");
      await first;
      guest.heard.length = 0;
      return guest;
    }

    on({ io }: Host): Socket {
      const socket = io.of(this.#nsp).sockets.get(this.client.id ?? "");
      if (!socket) throw new Error(`no socket ${this.client.id}`);
      return socket;
    }

    async connected(): Promise<void> {
      await received(this.client, "connect");
    }

    /** Loses its connection. */
    async leave(): Promise<void> {
      const lost = received(this.client, "disconnect");
      this.client.io.engine.close();
      await lost;
    }

    /** Comes back to a server; whether that knows it. */
    async back({ port }: { port: number }): Promise<boolean> {
      Object.assign(this.client.io, { uri: `http://127.0.0.1:${port}` });
      const connected = this.connected();
      this.client.connect();
      await connected;
      return this.client.recovered;
    }

    get numbers(): unknown[] {
      return this.heard.map(([, number]) => number);
    }
  }

  const noticed = ({ io }: Host) => eventually(() => expect(io.of("/").sockets.size).toBe(0));
  const bySender = (heard: unknown[][], sender: string) =>
    heard.filter(([, from]) => from === sender).map(([, , number]) => number);

  test.each([
    ["its own server", 0],
    ["another server", 1],
  ])("gives a client that comes back to %s its id, rooms, data and what it missed", async (_, to) => {
    const nodes = await recovering();
    const [a, b, c] = nodes;
    const guest = await Guest.at(a, ["red", "blue"]);
    const { id } = guest.client;
    guest.on(a).data = { name: "ann" };
    await guest.leave();
    await noticed(a);
    const emitter = createEmitter({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    await emitter.ready;
    const emits: ((n: number) => unknown)[] = [
      (n) => b.io.emit("n", n),
      (n) => a.io.to("red").emit("n", n, { deep: Buffer.from("x") }),
      (n) => c.io.to(["red", "blue"]).emit("n", n),
      (n) => b.io.to(id ?? "").emit("n", n),
      (n) => b.io.to("blue").except("green").emit("n", n),
      (n) => emitter.to("red").emit("n", n),
    ];
    for (const [n, emit] of emits.entries()) {
      emit(n);
      await eventually(() => expect(a.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
      await eventually(() => expect(b.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
      await eventually(() => expect(c.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
    }
    for (const { io } of [a, b]) {
      io.to("red").except("blue").emit("not for it");
      io.to("green").emit("not for it");
      io.volatile.emit("not for it");
      io.of("/chat").emit("not for it");
    }
    for (const { io } of [a, b]) await io.fetchSockets(); // what was emitted before has come
    const node = nodes[to] ?? a;
    await settled();
    expect(await guest.back(node)).toBe(true);
    expect(guest.client.id).toBe(id);
    const socket = guest.on(node);
    expect([socket.data, [...socket.rooms].toSorted()]).toEqual([{ name: "ann" }, ["blue", id, "red"].toSorted()]);
    c.io.to("blue").emit("n", 6);
    await eventually(() => expect(guest.numbers).toEqual([0, 1, 2, 3, 4, 5, 6]));
    expect(guest.heard[1]?.[2]).toEqual({ deep: Buffer.from("x") });
  });

  test("is exact while several servers emit and clients come back to any of them again and again", async () => {
    const nodes = await recovering();
    const guests = await Promise.all(Array.from({ length: 6 }, (_, i) => Guest.at(nodes[i % 3] ?? nodes[0], ["red"])));
    const over = Promise.withResolvers<void>();
    const emitting = nodes.map(async ({ io }, sender) => {
      let number = 0;
      let isOver = false;
      void over.promise.then(() => (isOver = true));
      for (; !isOver; await Bun.sleep(4)) io.to("red").emit("n", String(sender), number++);
      return number;
    });
    let recovered = 0;
    await Promise.all(
      guests.map(async (guest, g) => {
        for (let i = 0; i < 10; i++) {
          await guest.leave();
          await Bun.sleep((g * 7 + i * 13) % 40);
          const isKnown = await guest.back(nodes[(g + i) % 3] ?? nodes[0]);
          recovered += Number(isKnown);
        }
      }),
    );
    over.resolve();
    const counts = await Promise.all(emitting);
    expect(recovered).toBe(60);
    for (const { heard } of guests)
      for (const [sender, count] of counts.entries()) {
        await eventually(() => expect(bySender(heard, String(sender)).at(-1)).toBe(count - 1), 5_000);
        const numbers = bySender(heard, String(sender));
        expect(numbers).toEqual(Array.from({ length: count - Number(numbers[0]) }, (_, i) => Number(numbers[0]) + i));
      }
  }, 20_000);

  /** What a client presents when it comes back. */
  interface Ticket {
    pid: string;
    offset: string;
  }
  function ticketOf({ client }: Guest): Ticket {
    const { _pid: pid, _lastOffset: offset } = client as unknown as { _pid: string; _lastOffset: string };
    return { pid, offset };
  }

  /** Connects as a client that presents this; gives the id that it gets. */
  async function present({ port }: { port: number }, auth: Partial<Ticket>, options: ClientOptions = {}) {
    const url = `http://127.0.0.1:${port}`;
    const manager = new Manager(url, { transports: ["websocket"], reconnection: false, ...options });
    const client = manager.socket("/", { auth });
    closers.unshift(() => client.disconnect());
    await received(client, "connect");
    return client.id;
  }

  test("takes a client back that is there before its old server has noticed the loss", async () => {
    const [a, b] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    const { id = "" } = guest.client;
    guest.on(a).data = { name: "ann" };
    expect(await present(b, ticketOf(guest))).toBe(id);
    expect([a.io.of("/").sockets.has(id), b.io.of("/").sockets.get(id)?.data]).toEqual([false, { name: "ann" }]);
  });

  test("takes a client back to a server that has just started", async () => {
    const [a, b] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    b.io.to("red").emit("n", 1);
    const d = await start({}, { connectionStateRecovery: {} });
    expect(await guest.back(d)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
    await guest.leave();
    await noticed(d);
    await d.io.close(); // hands the session over
    const e = await start({}, { connectionStateRecovery: {} });
    expect(await guest.back(e)).toBe(true);
  });

  test("takes a session over however late the answer comes, for by then it is nowhere else", async () => {
    const link = await Proxy.open(broker.port);
    const amqpConnection = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const [a, b] = await Promise.all([
      start({ amqpConnection }, { connectionStateRecovery: {} }),
      start({ requestsTimeout: 400 }, { connectionStateRecovery: {} }),
    ]);
    closers.push(async () => {
      await a.adapter.close();
      link.close();
    });
    await acquainted([a, b]);
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    a.io.to("red").emit("n", 1);
    const { onMessage } = a.adapter;
    a.adapter.onMessage = (message, origin) => {
      if (message.type === "claim") link.latency = 500;
      onMessage.call(a.adapter, message, origin);
    };
    expect(await guest.back(b)).toBe(true);
    link.latency = 0;
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test("gives once what a third server sends again while the session is on its way", async () => {
    const link = await Proxy.open(broker.port);
    const allowed = Promise.withResolvers<void>();
    const late: Pass = ({ content, again, send, confirm }) => {
      if (!again && !content.includes('"begin"')) return send();
      queueMicrotask(confirm);
      void allowed.promise.then(send);
    };
    const server = { connectionStateRecovery: {} };
    const far = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const [a, b, c] = await Promise.all([
      start({}, server),
      start({ amqpConnection: far }, server),
      start({ amqpConnection: tampered(late) }, server),
    ]);
    closers.push(async () => {
      await b.adapter.close();
      link.close();
      errorsOf(b);
    });
    await acquainted([a, b, c]);
    const [guest, ann] = await Promise.all([Guest.at(a, ["red"]), join(a, ["red"])]);
    await guest.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    const { onMessage } = a.adapter;
    a.adapter.onMessage = (message, origin) => {
      if (message.type !== "claim") return onMessage.call(a.adapter, message, origin);
      link.cut("consuming");
      void eventually(() => expect(b.adapter.stats.connected).toBe(false)).then(async () => {
        c.io.to("red").emit("n", 1);
        await received(ann.client, "n");
        onMessage.call(a.adapter, message, origin);
        link.heal();
      });
    };
    const back = guest.back(b);
    await eventually(() => expect(b.adapter.stats).toMatchObject({ connected: true, reconnects: { consuming: 1 } }));
    await Promise.race([back, Bun.sleep(300)]);
    allowed.resolve();
    expect(await back).toBe(true);
    c.io.to("red").emit("n", 2);
    await eventually(() => expect(guest.numbers).toContain(2));
    expect(guest.numbers).toEqual([1, 2]);
  });

  test("takes a client back ten times in a row, at once, though it hears nothing between", async () => {
    const nodes = await recovering();
    const guest = await Guest.at(nodes[0], ["red"]);
    const { id } = guest.client;
    for (let i = 1; i <= 10; i++) {
      await guest.leave();
      expect([i, await guest.back(nodes[i % 3] ?? nodes[0])]).toEqual([i, true]);
    }
    nodes[2].io.to("red").emit("n", 1);
    await eventually(() => expect(guest.numbers).toEqual([1]));
    expect(guest.client.id).toBe(id);
  });

  test("gives packets again that were lost with several connections in a row", async () => {
    const nodes = await recovering();
    const [a, b, c] = nodes;
    const guest = await Guest.at(a, ["red"]);
    const ticket = ticketOf(guest);
    await guest.leave();
    await noticed(a);
    c.io.to("red").emit("n", 1);
    await eventually(() => expect(c.adapter.stats.unconfirmed).toBe(0));
    // Comes back to each server, and is lost again before it has read a word.
    for (const node of [b, a, c, b]) {
      const id = await present(node, ticket);
      expect(id).toBeString();
      for (const socket of node.io.of("/").sockets.values()) socket.conn.close();
      await noticed(node);
      node.io.to("red").emit("n", 2);
      await eventually(() => expect(node.adapter.stats.unconfirmed).toBe(0));
    }
    expect(await guest.back(a)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1, 2, 2, 2, 2]));
  });

  test("keeps a quiet client's session for longer than its log reaches, if it has missed nothing", async () => {
    const nodes = await recovering({ recoveryBytes: 20_000 });
    const [a, b] = nodes;
    const others = await Guest.at(a, ["blue"]);
    const guest = await Guest.at(a, ["red"]);
    const chatter = async () => {
      for (let n = 0; n < 200; n++) a.io.to("blue").emit("n", n, "x".repeat(100));
      await eventually(() => expect(others.numbers.at(-1)).toBe(199));
      others.heard.length = 0;
    };
    await chatter();
    await guest.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    await chatter();
    expect(await guest.back(a)).toBe(true);
    await chatter();
    await guest.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    await chatter();
    expect(await guest.back(b)).toBe(true);
    a.io.to("red").emit("n", 1);
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test.each([0, 1])(
    "begins a session anew rather than lose packets that its log has let go (server %d)",
    async (to) => {
      const nodes = await recovering({ recoveryBytes: 20_000 });
      const [a] = nodes;
      const guest = await Guest.at(a, ["red"]);
      await guest.leave();
      await noticed(a);
      for (let n = 0; n < 200; n++) a.io.to("red").emit("n", n, "x".repeat(100));
      expect(await guest.back(nodes[to] ?? a)).toBe(false);
    },
  );

  test("gives many clients what they have missed, though a copy for each would not go into its log", async () => {
    const [a, b, c] = await recovering({ recoveryBytes: 20_000 });
    const guests = await Promise.all(Array.from({ length: 20 }, () => Guest.at(a, ["red"])));
    await Promise.all(guests.map((guest) => guest.leave()));
    await noticed(a);
    for (let n = 0; n < 40; n++) b.io.to("red").emit("n", n, "x".repeat(100));
    await eventually(() => expect(b.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
    await a.io.close(); // hands the sessions over
    for (const { io } of [b, c]) io.to("red").emit("n", 40);
    for (const guest of guests) {
      expect(await guest.back(b)).toBe(true);
      await eventually(() => expect(guest.numbers).toEqual([...Array(40).keys(), 40, 40]));
    }
    const [first] = guests;
    await first?.leave();
    await eventually(() => expect(b.io.of("/").sockets.size).toBe(19));
    b.io.to("red").emit("n", 41);
    expect(await first?.back(c)).toBe(true);
    await eventually(() => expect(first?.numbers.at(-1)).toBe(41));
  });

  test("claims a session once the namespace is bound, though its client is in no room", async () => {
    const [a, b] = await Promise.all([
      start({}, { connectionStateRecovery: {} }),
      start({ amqpConnection: bindingLate("/doc-1") }, { connectionStateRecovery: {} }),
    ]);
    await acquainted([a, b]);
    for (const { io } of [a, b]) io.of(/^\/doc-/);
    const guest = await Guest.at(a, [], "/doc-1");
    await guest.leave();
    const docs = adapterOf(a.io, "/doc-1");
    await eventually(() => expect(docs.sids.size).toBe(0));
    const { onMessage } = docs;
    docs.onMessage = (message, origin) => {
      onMessage.call(docs, message, origin);
      if (message.type === "claim") a.io.of("/doc-1").emit("n", 1);
    };
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test("gives what a sender emitted that closed meanwhile once", async () => {
    const binding = Promise.withResolvers<void>();
    const [a, b] = await Promise.all([
      start({}, { connectionStateRecovery: {} }),
      start({ amqpConnection: bindingLate("/#blue", binding.resolve) }, { connectionStateRecovery: {} }),
    ]);
    await acquainted([a, b]);
    await Guest.at(b, ["red"]);
    await settled();
    const guest = await Guest.at(a, ["red", "blue"]);
    await guest.leave();
    await noticed(a);
    const emitter = createEmitter({ amqpConnection, prefix });
    await emitter.ready;
    const back = guest.back(b);
    await binding.promise; // the session is claimed when blue is bound
    emitter.to("red").emit("n", 1);
    await emitter.close();
    expect(await back).toBe(true);
    b.io.to("red").emit("n", 2);
    await eventually(() => expect(guest.numbers.at(-1)).toBe(2));
    expect(guest.numbers).toEqual([1, 2]);
  });

  test("keeps a namespace open until the last session has gone, with its client or without", async () => {
    const server = { connectionStateRecovery: { maxDisconnectionDuration: 1_000 }, cleanupEmptyChildNamespaces: true };
    const [a, b] = await Promise.all([start({}, server), start({}, server)]);
    await acquainted([a, b]);
    for (const { io } of [a, b]) io.of(/^\/doc-/);
    const isOpen = ({ io }: Host) => io._nsps.has("/doc-1");
    const guest = await Guest.at(a, ["red"], "/doc-1");
    const lose = async (node: Host) => {
      await guest.leave();
      await eventually(() => expect(node.io.of("/doc-1").sockets.size).toBe(0));
      expect(isOpen(node)).toBe(true);
      node.io.of("/doc-1").to("red").emit("n", 1);
    };
    await lose(a);
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
    await eventually(() => expect(isOpen(a)).toBe(false));
    await lose(b);
    await eventually(() => expect(isOpen(b)).toBe(false), 4_000);
  });

  test("for any time is the same on another server", async () => {
    const server = { connectionStateRecovery: { maxDisconnectionDuration: Infinity } };
    const [a, b] = await cluster({}, server);
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    a.io.to("red").emit("n", 1);
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test("keeps a namespace open while a client waits for its session, though another one goes", async () => {
    const server = { connectionStateRecovery: {}, cleanupEmptyChildNamespaces: true };
    const link = await Proxy.open(broker.port);
    const far = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const [a, b] = await Promise.all([start({}, server), start({ amqpConnection: far }, server)]);
    closers.push(async () => {
      await b.io.close();
      link.close();
    });
    await acquainted([a, b]);
    for (const { io } of [a, b]) io.of(/^\/doc-/);
    await join(a, [], "/doc-1");
    const guest = await Guest.at(a, ["red"], "/doc-1");
    const other = await join(b, [], "/doc-1");
    await guest.leave();
    await eventually(() => expect(a.io.of("/doc-1").sockets.size).toBe(1));
    link.latency = 50;
    const back = guest.back(b);
    await eventually(() => expect(adapterOf(b.io, "/doc-1")["recovery"]?.keepsOpen).toBe(true));
    other.client.disconnect();
    expect(await back).toBe(true);
    link.latency = 0;
  });

  test("opens no namespace while the server closes", async () => {
    const link = await Proxy.open(broker.port);
    const far = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const server = { connectionStateRecovery: {} };
    const [a, b] = await Promise.all([start({ amqpConnection: far }, server), start({}, server)]);
    await acquainted([a, b]);
    a.io.of(/^\/doc-/);
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    link.latency = 50;
    const closed = a.adapter.close(); // hands the session over
    await join(a, [], "/doc-9");
    await closed;
    link.latency = 0;
    await eventually(async () => expect(await queues()).toHaveLength(1));
    expect(await guest.back(b)).toBe(true);
    link.close();
  });

  test("does not give a client what a room heard before it joined", async () => {
    const [a, b] = await recovering();
    await Guest.at(a, ["blue"]);
    const guest = await Guest.at(a, ["red"]);
    a.io.to("blue").emit("n", 1);
    await guest.on(a).join("blue");
    await guest.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    a.io.to("blue").emit("n", 2);
    expect(await guest.back(b)).toBe(true);
    a.io.to("blue").emit("n", 3);
    await eventually(() => expect(guest.numbers).toEqual([2, 3]));
  });

  test.each([
    ["skips middlewares", {}, false],
    ["runs middlewares if that is wanted, and keeps what comes meanwhile", { skipMiddlewares: false }, true],
  ])("%s", async (_, connectionStateRecovery, runs) => {
    const nodes = await recovering({}, { connectionStateRecovery });
    const [a, b, c] = nodes;
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    let ran = 0;
    b.io.use((_, next) => {
      ran++;
      c.io.to("red").emit("n", 1);
      b.io.to("red").emit("n", 2);
      setTimeout(next, 100);
    });
    expect(await guest.back(b)).toBe(true);
    expect(ran).toBe(Number(runs));
    if (runs) await eventually(() => expect(guest.numbers.toSorted()).toEqual([1, 2]));
  });

  test("keeps the session of a client that a middleware refuses, or that is gone before it is connected", async () => {
    const [a, b, c] = await recovering({}, { connectionStateRecovery: { skipMiddlewares: false } });
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    b.io.use((_, next) => next(new Error("no")));
    const refused = received(guest.client, "connect_error");
    Object.assign(guest.client.io, { uri: `http://127.0.0.1:${b.port}` });
    guest.client.connect();
    await refused;
    guest.client.io.engine.close();
    c.io.to("red").emit("n", 1);
    expect(await guest.back(c)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test("gives a session to one of two that ask at once, and to none that comes later", async () => {
    const [a, b, c] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    const { id = "" } = guest.client;
    const ticket = ticketOf(guest);
    await guest.leave();
    await noticed(a);
    const ids = await Promise.all([present(b, ticket), present(c, ticket), present(a, ticket)]);
    expect(ids.filter((given) => given === id)).toHaveLength(1);
    await Bun.sleep(200);
    for (const node of [a, b, c]) expect(await present(node, ticket)).not.toBe(id);
  });

  test.each<[string, (ticket: Ticket) => Partial<Ticket>]>([
    ["an unknown id", ({ offset }) => ({ pid: "A".repeat(20), offset })],
    ["no offset", ({ pid }) => ({ pid })],
    ["another offset", ({ pid }) => ({ pid, offset: "foo" })],
    ["an offset of no server", ({ pid, offset }) => ({ pid, offset: offset.replace(/^.{8}/, "ABCDEFGH") })],
    ["an offset that was never given", ({ pid, offset }) => ({ pid, offset: `${offset}9` })],
    ["an offset that is no number", ({ pid, offset }) => ({ pid, offset: `${offset.slice(0, 9)}1e3` })],
    ["an offset from before it came", ({ pid, offset }) => ({ pid, offset: `${offset.slice(0, 9)}0` })],
  ])("begins anew for a client that presents %s", async (_, forge) => {
    const [a, b] = await recovering();
    const other = await Guest.at(a, ["red"]);
    const guest = await Guest.at(a, ["red"]);
    const ticket = ticketOf(guest);
    await guest.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    a.io.to("red").emit("n", 1);
    for (const node of [a, b]) {
      const id = await present(node, forge(ticket));
      expect([id === guest.client.id, node.io.of("/").sockets.get(id ?? "")?.recovered]).toEqual([false, false]);
    }
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect([guest.numbers, other.numbers]).toEqual([[1], [1]]));
  });

  test("lets sessions and the bindings of their rooms go when their time is over", async () => {
    const [a, b] = await recovering({}, { connectionStateRecovery: { maxDisconnectionDuration: 300 } });
    const bound = async () => (await bindings()).filter(({ key }) => key === "/#red").length;
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    expect(await bound()).toBe(1);
    await eventually(async () => expect(await bound()).toBe(0), 3_000);
    expect(await guest.back(b)).toBe(false);
  });

  test("keeps no session longer than it should, though nothing has looked", async () => {
    const [a] = await recovering({}, { connectionStateRecovery: { maxDisconnectionDuration: 100 } });
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await Bun.sleep(150);
    expect(await guest.back(a)).toBe(false);
  });

  test("begins anew, and says why, where a client's data cannot be sent to the server that it comes back to", async () => {
    const [a, b] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    guest.on(a).data = { n: 1n };
    await guest.leave();
    await noticed(a);
    expect(await guest.back(b)).toBe(false);
    expect(errorsOf(a)).toEqual([
      expect.stringContaining("cannot be sent to another server: its client begins anew there"),
    ]);
  });

  test("bears rooms that are neither strings nor numbers, also once its log is full", async () => {
    const [a, b] = await recovering({ recoveryBytes: 20_000 });
    const guest = await Guest.at(b, ["red"]);
    for (let n = 0; n < 300; n++) a.io.to(["red", false as unknown as string]).emit("n", n, "x".repeat(100));
    await eventually(() => expect(guest.numbers.at(-1)).toBe(299));
    expect(guest.numbers).toHaveLength(300);
    await guest.leave();
    await noticed(b);
    a.io.to(["red", 42n as unknown as string]).emit("n", 300);
    expect(await guest.back(a)).toBe(true);
    await eventually(() => expect(guest.numbers.at(-1)).toBe(300));
  });

  test("works with another parser", async () => {
    const [a, b] = await recovering({}, { parser: msgpack });
    const guest = await Guest.at(a, ["red"], "/", { parser: msgpack });
    await guest.leave();
    await noticed(a);
    a.io.to("red").emit("n", 1, Buffer.from("x"));
    b.io.to("red").emit("n", 2);
    await eventually(() => expect(b.adapter.stats.unconfirmed).toBe(0));
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect(guest.numbers.toSorted()).toEqual([1, 2]));
  });

  test("hands the sessions of a server that closes to another one, one server after the other", async () => {
    const [a, b, c] = await recovering();
    const [gone, there] = [await Guest.at(a, ["red"]), await Guest.at(a, ["red"])];
    const guests = [gone, there, await Guest.at(b, ["red"])]; // b will hand over what it was handed, and its own
    await gone.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    a.io.to("red").emit("n", 1);
    await eventually(() => expect(there.numbers).toEqual([1]));
    await a.io.close();
    c.io.to("red").emit("n", 2);
    await eventually(() => expect(c.adapter.stats.unconfirmed).toBe(0));
    await acquainted([b, c]);
    await b.io.close();
    c.io.to("red").emit("n", 3);
    const d = await start({ requestsTimeout: 2_000 }, { connectionStateRecovery: {} });
    await acquainted([c, d]);
    for (const guest of guests) {
      expect(await guest.back(d)).toBe(true);
      c.io.to("red").emit("n", 4);
    }
    for (const guest of guests) await eventually(() => expect(guest.numbers).toEqual([1, 2, 3, 4, 4, 4]));
  });

  test("hands over what it can, though the data of one client cannot be sent", async () => {
    const settings = [{ requestsTimeout: 2_000 }, { connectionStateRecovery: {} }] as const;
    const [a, b] = [await start(...settings), await start(...settings)];
    await acquainted([a, b]);
    const [odd, own, inherited] = [await Guest.at(b), await Guest.at(b), await Guest.at(a)];
    odd.on(b).data = { n: 1n };
    for (const guest of [odd, own]) await guest.leave();
    await noticed(b);
    await a.io.close(); // what b inherits is handed over apart from its own sessions
    const c = await start(...settings);
    await acquainted([b, c]);
    await b.io.close();
    expect(errorsOf(b)).toEqual([expect.stringContaining("cannot be sent to another server")]);
    expect([await odd.back(c), await own.back(c), await inherited.back(c)]).toEqual([false, true, true]);
  });

  test("begins anew soon after the server that knew the client was killed", async () => {
    const b = await start({}, { connectionStateRecovery: {} });
    const victim = child(`
      const io = new Server(0, { serveClient: false, connectionStateRecovery: {}, adapter: createAdapter({ amqpConnection, prefix }) });
      io.on("connection", (socket) => socket.emit("welcome"));
      await io.of("/").adapter.ready;
      console.log(io.httpServer.address().port);`);
    const { value } = await victim.stdout.getReader().read();
    const port = Number(new TextDecoder().decode(value));
    await acquainted([b], 2);
    const guest = new Guest({ port });
    await received(guest.client, "welcome");
    const lost = received(guest.client, "disconnect");
    victim.kill("SIGKILL");
    await lost;
    let recovered = true;
    expect(await milliseconds(async () => (recovered = await guest.back(b)))).toBeLessThan(1_500);
    expect(recovered).toBe(false);
  });

  test("takes a client back to its own server while the broker is away, and to another one as a new one, at once", async () => {
    const links = await Promise.all([Proxy.open(broker.port), Proxy.open(broker.port)]);
    const nodes = await Promise.all(
      links.map(({ port }) =>
        start(
          { amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${port}?heartbeat=2`), requestsTimeout: 1_000 },
          { connectionStateRecovery: {} },
        ),
      ),
    );
    const [a, b] = nodes;
    if (!a || !b) throw new Error("two links are two servers");
    closers.push(async () => {
      await Promise.all(nodes.map(({ adapter }) => adapter.close()));
      for (const link of links) link.close();
      nodes.forEach(errorsOf);
    });
    await acquainted(nodes);
    const [own, away] = await Promise.all([Guest.at(a, ["red"]), Guest.at(a, ["red"])]);
    for (const link of links) link.cut();
    await eventually(() => expect(nodes.map(({ adapter }) => adapter.stats.connected)).toEqual([false, false]));
    await Promise.all([own.leave(), away.leave()]);
    await noticed(a);
    a.io.to("red").emit("n", 1);
    expect(await own.back(a)).toBe(true);
    await eventually(() => expect(own.numbers).toEqual([1]));
    let recovered = true;
    expect(await milliseconds(async () => (recovered = await away.back(b)))).toBeLessThan(500);
    expect(recovered).toBe(false);
  });

  test("stores and stamps nothing where it is off", async () => {
    const [a, b] = await cluster();
    const ann = await join(a, ["red"]);
    b.io.to("red").emit("n", 1);
    await eventually(() => expect(ann.heard).toEqual([["n", 1]]));
    expect((ann.client as unknown as { _pid?: string })._pid).toBeUndefined();
    a.adapter.persistSession({ sid: "x", pid: "y", rooms: ["red"], data: {} });
    expect(a.adapter.restoreSession("y", "z")).rejects.toThrow("off");
  });
});

describe("options", () => {
  const required = { amqpConnection: () => connect("amqp://127.0.0.1:1") };
  test.each<[option: string, value: unknown, expected: RegExp]>([
    ["amqpConnection", undefined, /function.*undefined/],
    ["amqpConnection", "amqp://localhost", /function.*amqp:\/\/localhost/],
    ["prefix", 42, /string.*42/],
    ["prefix", "", /string/],
    ["roomExchanges", "no", /true|false|boolean.*no/],
    ["socketRooms", "all", /shared.*bound.*all/],
    ["requestsTimeout", "5s", /number.*5s/],
    ["requestsTimeout", -1, /positive.*-1/],
    ["heartbeatInterval", NaN, /number.*NaN/],
    ["heartbeatTimeout", 0, /positive.*0/],
    ["queueArguments", [], /object.*\[/],
    ["maxPayload", "16 MiB", /number.*16 MiB/],
    ["journal", 5, /bytes.*ms.*5/],
    ["journal", { bytes: "1 MB" }, /bytes.*1 MB/],
    ["journal", { ms: -1 }, /ms.*-1/],
  ])("%s: %j is refused by name, with what was expected", (option, value, expected) => {
    const create = () => createAdapter({ ...required, [option]: value });
    expect(create).toThrow(TypeError);
    expect(create).toThrow(option);
    expect(create).toThrow(expected);
  });

  test("that an emitter has are checked as well", () => {
    expect(() => createEmitter({ ...required, prefix: 42 as unknown as string })).toThrow(TypeError);
    const onError = "log" as unknown as () => void;
    expect(() => createEmitter({ ...required, onError })).toThrow(/onError.*function.*log/);
    expect(() => createEmitter({} as EmitterOptions)).toThrow(/amqpConnection/);
    expect(() => createAdapter(undefined as unknown as AdapterOptions)).toThrow(TypeError);
  });

  test("left undefined have their defaults", async () => {
    const none = { prefix: undefined, journal: { ms: undefined }, socketRooms: undefined };
    const make: (nsp: Namespace) => AmqpAdapter = createAdapter({ ...required, ...none });
    const { io } = await host();
    const adapter = make(io.of("/alone"));
    adapter.on("error", () => {}); // there is no broker
    closers.push(() => adapter.close());
    const journal = { bytes: 64 * 2 ** 20, ms: 60_000 };
    expect(adapter["node"].settings).toMatchObject({ prefix: "socket.io", journal, socketRooms: "shared" });
  });

  test("may be getters and methods of a class", async () => {
    class Configuration implements AdapterOptions, EmitterOptions {
      readonly #url = broker.url;
      readonly #reported = Promise.withResolvers<Error>();
      amqpConnection() {
        return connect(this.#url);
      }
      get prefix() {
        return prefix;
      }
      onError(error: Error) {
        this.#reported.resolve(error);
      }
      get reported() {
        return this.#reported.promise;
      }
    }
    const { io } = await host();
    io.adapter(createAdapter(new Configuration()));
    await adapterOf(io).ready;
    const configuration = new Configuration();
    const emitter = createEmitter(configuration);
    closers.push(() => emitter.close());
    emitter.emit("too large", Buffer.alloc(2 ** 24));
    expect(String(await configuration.reported)).toContain("maxPayload");
    expect(await queues()).toHaveLength(1);
  });
});

describe("a process", () => {
  const nowhere = `() => connect("amqp://127.0.0.1:1")`;
  const programs = {
    "with a server": `${A_SERVER} io.of("/").adapter.addAll("id", new Set(["red"])); io.emit("hello"); await io.close();`,
    "with another namespace": `${A_SERVER} io.of("/chat"); await io.of("/chat").adapter.ready; await io.close();`,
    "with a server closed before it was connected": `
      const io = new Server(0, { adapter: createAdapter({ amqpConnection, prefix }) });
      await io.close();`,
    "with a server closed while the broker is away": `
      const io = new Server(0, { adapter: createAdapter({ amqpConnection: ${nowhere}, prefix }) });
      await new Promise((resolve) => io.of("/").adapter.once("error", resolve));
      await io.close();`,
    "with two servers that close together": `
      const servers = [1, 2].map(() => new Server(0, { adapter: createAdapter({ amqpConnection, prefix }) }));
      for (const io of servers) await io.of("/").adapter.ready;
      const rooms = Array.from({ length: 60 }, (_, i) => "room" + i);
      for (const io of servers) await io.of("/").adapter.addAll("id", new Set(rooms));
      while (servers.some((io) => io.of("/").adapter.stats.rooms < 60)) await Bun.sleep(10);
      await Promise.all(servers.map((io) => io.close()));`,
    "with an emitter": `
      const emitter = createEmitter({ amqpConnection, prefix });
      emitter.emit("hello");
      await emitter.close();`,
  };
  test.each(Object.entries(programs))("%s ends by itself after close()", async (_, source) => {
    const { exited, stdout, stderr } = child(`${source}
      console.log("closed");
      const closedAt = performance.now();
      process.on("exit", () => performance.now() - closedAt > 1_000 && console.log("late"));`);
    expect(await exited).toBe(0);
    expect([await stdout.text(), await stderr.text()]).toEqual(["closed\n", ""]);
  });

  test("loads nothing at run time but the peer dependencies", async () => {
    const source = await Bun.file(new URL("index.ts", import.meta.url)).text();
    const imports = new Bun.Transpiler({ loader: "ts" }).scanImports(source);
    expect(imports.map(({ path }) => path).filter((path) => !path.startsWith("node:"))).toEqual(["socket.io-adapter"]);
  });
});

test("nothing of all this is left on the broker", async () => {
  const left = (await broker.exchanges(RUN)).filter((name) => !/^test-\d+-\d+x?(#keys)?$/.test(name));
  const bound = (await broker.bindings(RUN)).filter(({ key }) => key !== "");
  expect([left, await broker.queues(RUN), bound]).toEqual([[], [], []]);
});
