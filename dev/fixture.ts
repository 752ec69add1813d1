/**
 * What the tests share: a live broker, three servers or more in this process, real clients. Each test has a prefix of its own, so that
 * tests do not meet; what must not arrive is shown by a later packet on the same way, for order holds.
 */
import { Server as BunEngine } from "@socket.io/bun-engine";
import { connect, type Options as Amqp } from "amqplib";
import { afterAll, afterEach, beforeEach, expect } from "bun:test";
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { Server, type ServerOptions, type Socket } from "socket.io";
import { Manager, type ManagerOptions, type Socket as ClientSocket } from "socket.io-client";
import { AmqpAdapter, createAdapter, type AdapterOptions } from "../index";
import { startBroker } from "./broker";

export const RUN = `test-${process.pid}`;
// Not in beforeAll(): a test that times out would take a process that was started there down with it.
export const broker = await startBroker();
/** See `roomExchanges`: where rooms have exchanges by default, and where they are refused. */
const version = await (async () => {
  const connection = await connect(broker.url);
  const { version } = connection.connection.serverProperties;
  await connection.close();
  return version;
})();
export const haveRoomExchanges = Bun.semver.order(version, "4.0.0") < 0;
/** Where a message for several rooms costs the broker a look at each binding. */
export const scansBindings = Bun.semver.order(version, "3.11.0") < 0;
export const refuseRoomExchanges = Bun.semver.order(version, "4.2.0") >= 0;
export let prefix: string;
let tests = 0;
export const closers: (() => unknown)[] = [];
export const errors = new Map<AmqpAdapter, Error[]>();

/** For each test of a file: gives it a prefix, and closes what it has opened. */
export function useBroker(): void {
  beforeEach(() => {
    prefix = `${RUN}-${++tests}`;
  });
  afterEach(async () => {
    await Promise.all(closers.splice(0).map((close) => close()));
    const unexpected = [...errors.values()].flat();
    for (const reported of errors.values()) reported.length = 0;
    expect(unexpected).toEqual([]);
  }, 5_000); // a close that takes longer waits for what never comes
}

/** The last test of a file. */
export async function nothingIsLeft(): Promise<void> {
  const left = (await broker.exchanges(RUN)).filter((name) => !/^test-\d+-\d+x?(#keys)?$/.test(name));
  const bound = (await broker.bindings(RUN)).filter(({ key }) => key !== "");
  expect([left, await broker.queues(RUN), bound]).toEqual([[], [], []]);
}

/** A Socket.IO server on a port of its own. */
export interface Host {
  io: Server;
  port: number;
}
export type HostOptions = Partial<ServerOptions> & { engine?: "http" | "bun" };

export async function host({ engine = "http", ...options }: HostOptions = {}): Promise<Host> {
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
export interface Node extends Host {
  adapter: AmqpAdapter;
}
export type Options = Partial<AdapterOptions>;
export const amqpConnection = () => connect(broker.url);
/** Opens connections on which a key is bound 300 ms late; `begun` is called when it should be. */
export const bindingLate = (late: string, begun?: () => void) => async () => {
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
export interface Passing {
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

export type Pass = (message: Passing) => void;
export const unchanged: Pass = ({ send }) => send();

/** Opens connections whose published messages go through `pass`. */
export const tampered =
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
export const urlWith = (parts: Partial<URL>): string => Object.assign(new URL(broker.url), parts).href;

/** A server whose adapter may still be on its way to the broker. A test that expects errors takes them with `errorsOf()`. */
export async function start(options: Options = {}, server?: HostOptions): Promise<Node> {
  const { io, port } = await host(server);
  io.adapter(createAdapter({ amqpConnection, prefix, ...options }));
  const adapter = adapterOf(io);
  errors.set(adapter, []);
  adapter.on("error", (error: Error) => errors.get(adapter)?.push(error));
  return { io, port, adapter };
}

export function adapterOf(io: Server, nsp = "/"): AmqpAdapter {
  const { adapter } = io.of(nsp);
  if (!(adapter instanceof AmqpAdapter)) throw new Error(`${nsp} has another adapter`);
  return adapter;
}

/** What this server's adapter has reported until now. */
export const errorsOf = ({ adapter }: Node): string[] => errors.get(adapter)?.splice(0).map(String) ?? [];

/** Three servers that know each other. */
export async function cluster(options?: Options, server?: HostOptions): Promise<[Node, Node, Node]> {
  const nodes = await Promise.all([start(options, server), start(options, server), start(options, server)]);
  await acquainted(nodes);
  return nodes;
}

export async function acquainted(nodes: Node[], count = nodes.length): Promise<void> {
  await Promise.all(nodes.map(({ adapter }) => adapter.ready));
  await eventually(async () => {
    for (const { adapter } of nodes) expect(await adapter.serverCount()).toBe(count);
  });
}

export type ClientOptions = Partial<ManagerOptions>;

/** A client and its socket on the server, and each event that it heard. */
export interface Member {
  client: ClientSocket;
  socket: Socket;
  heard: unknown[][];
}
export type People = Record<string, Member>;

export async function join(
  { io, port }: Host,
  rooms: string[] = [],
  nsp = "/",
  options: ClientOptions = {},
): Promise<Member> {
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

export const received = (client: ClientSocket, event: string): Promise<unknown[]> =>
  new Promise((resolve) => client.once(event, (...args: unknown[]) => resolve(args)));

/** Ann is in red on the first server, Bob in red and blue on the second, Cat in blue on the third. */
export async function crew(options?: Options, server?: HostOptions, client?: ClientOptions) {
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
export function shared<T>(open: () => Promise<T>): () => Promise<T> {
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
export function introduce(people: People): void {
  for (const [name, { client }] of Object.entries(people))
    client.on("name?", (answer: (name: string) => void) => answer(name));
}

/** A server, a namespace, a set of rooms, an emitter. */
export interface Emitting {
  emit(event: string, ...args: unknown[]): unknown;
}

/** What each of `people` has heard by the time that a last packet of `sender` reaches them. */
export async function heardFrom(sender: Emitting, people: People): Promise<Record<string, unknown[][]>> {
  const ends = Object.values(people).map(({ client }) => received(client, "end"));
  sender.emit("end");
  await Promise.all(ends);
  const heard = ({ heard }: Member) => heard.splice(0).filter(([event]) => event !== "end" && event !== "name?");
  return Object.fromEntries(Object.entries(people).map(([name, member]) => [name, heard(member)]));
}

/** The same for one event that only some hear, by their names: `only("ann cat", people, ["hello"])`. */
export const only = (names: string, people: People, event: unknown[]) =>
  Object.fromEntries(Object.keys(people).map((name) => [name, names.split(" ").includes(name) ? [event] : []]));

/** Repeats a check until it holds: for what no event tells, on the broker or on another server. */
export async function eventually(check: () => unknown, within = 2_000): Promise<void> {
  for (const end = performance.now() + within; ; await Bun.sleep(10)) {
    try {
      return void (await check());
    } catch (error) {
      if (performance.now() > end) throw error;
    }
  }
}

/** Each server reaches the clients of all three. */
export const reunited = (nodes: Node[], rooms = ["red", "blue"]) =>
  eventually(async () => {
    for (const { io } of nodes) {
      const names: unknown[] = await io.to(rooms).timeout(200).emitWithAck("name?");
      expect(names.toSorted()).toEqual(["ann", "bob", "cat"]);
    }
  });

/** Publishes as any AMQP client could, and waits for the broker's confirm. */
export async function publish(
  exchange: string,
  key: string,
  body: string | Buffer,
  properties?: Amqp.Publish,
): Promise<void> {
  const connection = await connect(broker.url);
  const channel = await connection.createConfirmChannel();
  channel.publish(exchange, key, Buffer.from(body), properties);
  await channel.waitForConfirms();
  await connection.close();
}
/** A message about the cluster itself: see dev/protocol.md. */
export function control(sender: string, json: string): Buffer {
  const frame = Buffer.alloc(32 + json.length);
  frame.set([2, 2]);
  frame.write(sender, 2, "latin1");
  frame.write(json, 32);
  return frame;
}

/** As the operator can, of all clients. */
export const closeConnections = () =>
  broker.evaluate(
    '[rabbit_networking:close_connection(Pid, "maintenance") || Pid <- rabbit_networking:connections()] =/= []',
  );

export const JSON_TYPE = { contentType: "application/json" };

/** Exchanges of this test beyond the two that stay, its queues, and the bindings of its queues and of rooms' exchanges. */
export const exchanges = async () => (await broker.exchanges(`${prefix}#`)).filter((name) => name !== `${prefix}#keys`);
export const queues = () => broker.queues(`${prefix}#`);
export const bindings = async () =>
  (await broker.bindings(prefix)).filter(({ destination }) => destination !== `${prefix}#keys`);
/** Every server has bound what its rooms want, and takes no longer everything. */
export const settled = () =>
  eventually(async () => expect((await bindings()).filter(({ source }) => source === prefix)).toEqual([]));

/** A process of its own; `source` may use what it imports here. */
export function child(source: string) {
  const program = `
    import { Server } from "socket.io";
    import { connect } from "amqplib";
    import { createAdapter, createEmitter } from "./index.ts";
    const prefix = ${JSON.stringify(prefix)};
    const amqpConnection = () => connect(${JSON.stringify(broker.url)});
    ${source}`;
  const child = Bun.spawn([process.execPath, "-e", program], {
    cwd: `${import.meta.dir}/..`,
    stdout: "pipe",
    stderr: "pipe",
  });
  closers.push(() => (child.kill("SIGKILL"), child.exited));
  return child;
}
export const A_SERVER = `
  const io = new Server(0, { serveClient: false, adapter: createAdapter({ amqpConnection, prefix }) });
  await io.of("/").adapter.ready;`;

export async function milliseconds(action: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await action();
  return performance.now() - start;
}
