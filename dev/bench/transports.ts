/** What is compared: this adapter, another version of it, its peers, the client library alone (the floor), and no broker at all (the ceiling). */
import { EventEmitter } from "node:events";
import { createServer } from "node:http";
import { connect, type Channel, type ChannelModel, type ConfirmChannel } from "amqplib";
import { Server, type ServerOptions, type Socket } from "socket.io";

export const TRANSPORTS = {
  amqp0: "socket.io-amqp0",
  before: "the version before",
  recovery: "with state recovery",
  redis: "@socket.io/redis-adapter",
  sharded: "the same, sharded",
  streams: "@socket.io/redis-streams-adapter",
  amqplib: "amqplib alone",
  memory: "in memory",
} as const;
export type Transport = keyof typeof TRANSPORTS;

/** Where a server stands. */
export interface Place {
  transport: Transport;
  amqp: string;
  redis: string;
  /** Keeps clusters apart that share a broker. */
  prefix: string;
  /** In ms. */
  heartbeatInterval: number;
  /** Whether operations are counted. */
  counted: boolean;
  /** The `index.ts` that `before` stands for. */
  before?: string | undefined;
  /** A folder for CPU profiles. */
  profile?: string | undefined;
}

/** What is told to whoever opened a member. */
export interface Observer {
  /** A client got a packet; `text` holds its payload, unless that is binary. */
  packet(text: string): void;
  /** A message came from the broker, for whichever room; only if `counted`. */
  message(): void;
  /** Something was asked of the AMQP broker; only if `counted`. */
  operation(): void;
}

export type Payload = string | Buffer;

/** One server of a cluster. */
export interface Member {
  /** Resolves once everything that was opened can be reached from elsewhere. */
  ready(): Promise<unknown>;
  /** Connects one client, in all these rooms. Gives how long the joins took, in ms. */
  join(rooms: string[]): Promise<number>;
  /** To one room, or to whoever is in one of several. */
  emit(rooms: string | string[], payload: Payload): void;
}

export async function openMember(place: Place, observer: Observer): Promise<Member> {
  const member =
    place.transport === "amqplib"
      ? await BareClient.open(place, observer)
      : new SocketServer(await ADAPTERS[place.transport](place, observer), observer.packet);
  await member.ready();
  return member;
}

// ── Socket.IO ────────────────────────────────────────────────────────────────────────────────────────────────────────

interface Opened {
  adapter?: ServerOptions["adapter"];
  /** Whether lost clients are recovered. */
  recovers?: boolean;
  /** Resolves once the subscriptions made so far are in place, where the adapter itself does not wait for them. */
  settled?: () => Promise<unknown>;
  /** The adapter's counters, where it has any. */
  stats?: (io: Server) => Stats;
}

/** What versions of this adapter count; newer ones have `dropped` of their own. */
interface Stats {
  rooms: number;
  lost: number;
  dropped?: number;
}

export class SocketServer implements Member {
  readonly http = createServer();
  readonly io: Server;
  readonly #opened: Opened;
  readonly #received: Observer["packet"];
  readonly #connections: Connection[] = [];

  constructor(opened: Opened, received: Observer["packet"]) {
    const { adapter, recovers } = opened;
    this.io = new Server(this.http, { ...(adapter && { adapter }), ...(recovers && { connectionStateRecovery: {} }) });
    this.#opened = opened;
    this.#received = received;
  }

  async ready(): Promise<void> {
    for (const { adapter } of this.io._nsps.values()) if ("ready" in adapter) await adapter.ready;
    await this.#opened.settled?.();
  }

  async join(rooms: string[]): Promise<number> {
    const socket = await this.connect();
    const start = performance.now();
    await socket.join(rooms);
    await this.#opened.settled?.();
    return performance.now() - start;
  }

  /**
   * Connects a client without a network: it begins where Engine.IO hands a connection to Socket.IO, so that the whole
   * adapter and Socket.IO run, encoding included, and no WebSocket is measured along with them.
   */
  connect(): Promise<Socket> {
    const socket = new Promise<Socket>((resolve) => this.io.once("connection", resolve));
    const connection = new Connection(this.#received);
    this.#connections.push(connection);
    this.io.engine.emit("connection", connection);
    connection.emit("data", "0");
    return socket;
  }

  disconnect(): void {
    for (const connection of this.#connections.splice(0)) connection.emit("close", "transport close");
  }

  emit(rooms: string | string[], payload: Payload): void {
    this.io.to(rooms).emit("event", payload);
  }

  /** How many rooms are bound on the broker now. */
  get bound(): number {
    return this.#opened.stats?.(this.io).rooms ?? 0;
  }

  /** How many packets of its own the server has given up. */
  get dropped(): number {
    const { dropped, lost = 0 } = this.#opened.stats?.(this.io) ?? {};
    return dropped ?? lost;
  }
}

/** As much of an Engine.IO connection as Socket.IO uses. */
class Connection extends EventEmitter {
  readonly protocol = 4;
  readonly id = crypto.randomUUID();
  readonly request = { headers: {}, connection: {}, url: "/" };
  readonly transport = { writable: true };
  readyState = "open";

  constructor(readonly received: Observer["packet"]) {
    super();
  }

  /** A packet is a string, followed by its binary attachments. */
  write(part: unknown): void {
    if (typeof part === "string") this.received(part);
  }

  close(): void {
    this.readyState = "closed";
  }
}

const ADAPTERS: Record<Exclude<Transport, "amqplib">, (place: Place, observer: Observer) => Promise<Opened>> = {
  async amqp0(place, observer) {
    return overAmqp(await import("../../index.ts"), place, observer);
  },

  async before(place, observer) {
    return overAmqp((await import(place.before ?? "")) as OwnAdapter, place, observer);
  },

  async recovery(place, observer) {
    return { ...overAmqp(await import("../../index.ts"), place, observer), recovers: true };
  },

  async redis({ redis, prefix, counted }, observer) {
    const { createAdapter } = await load<RedisAdapter>("@socket.io/redis-adapter@8");
    const [publishing, subscribing] = await redisClients(redis);
    if (counted) observeRedis(subscribing, observer);
    return { adapter: createAdapter(publishing, subscribing, { key: prefix }), settled: () => subscribing.ping() };
  },

  async sharded({ redis, prefix, counted }, observer) {
    const { createShardedAdapter } = await load<RedisAdapter>("@socket.io/redis-adapter@8");
    const [publishing, subscribing] = await redisClients(redis);
    if (counted) observeRedis(subscribing, observer);
    return {
      adapter: createShardedAdapter(publishing, subscribing, { channelPrefix: prefix }),
      settled: () => subscribing.ping(),
    };
  },

  async streams({ redis, prefix, heartbeatInterval }) {
    const { createAdapter } = await load<RedisAdapter>("@socket.io/redis-streams-adapter@0.3");
    const [publishing] = await redisClients(redis);
    // The default stream holds 10,000 packets, and a reader that falls further behind loses some.
    const options = { streamName: prefix, channelPrefix: prefix, maxLen: 100_000, heartbeatInterval };
    return { adapter: createAdapter(publishing, options) };
  },

  memory: () => Promise.resolve({}),
};

type OwnAdapter = Pick<typeof import("../../index.ts"), "createAdapter">;

function overAmqp({ createAdapter }: OwnAdapter, place: Place, observer: Observer): Opened {
  const { prefix, heartbeatInterval } = place;
  const amqpConnection = () => connectAmqp(place, observer);
  return {
    adapter: createAdapter({ amqpConnection, prefix, heartbeatInterval, heartbeatTimeout: heartbeatInterval * 2 }),
    stats: (io) => (io.of("/").adapter as unknown as { stats: Stats }).stats,
  };
}

async function connectAmqp({ amqp, counted }: Place, observer: Observer): Promise<ChannelModel> {
  const connection = await connect(amqp);
  if (counted) observe(connection, observer);
  return connection;
}

interface RedisClient {
  on(event: "error", listener: (error: Error) => void): unknown;
  connect(): Promise<unknown>;
  ping(): Promise<unknown>;
}
type CreateAdapter = (...args: unknown[]) => NonNullable<ServerOptions["adapter"]>;
interface RedisAdapter {
  createAdapter: CreateAdapter;
  createShardedAdapter: CreateAdapter;
}

async function redisClients(url: string): Promise<[RedisClient, RedisClient]> {
  const { createClient } = await load<{ createClient(options: { url: string }): RedisClient }>("redis@5");
  const clients: [RedisClient, RedisClient] = [createClient({ url }), createClient({ url })];
  for (const client of clients) client.on("error", () => {}); // Redis goes away in one of the cases
  await Promise.all(clients.map((client) => client.connect()));
  return clients;
}

/** A peer, which is not among the dependencies: Bun installs it into its cache at run time. */
function load<T>(specifier: string): Promise<T> {
  return import(specifier) as Promise<T>;
}

/** Tells of every message that the client's subscriptions get. */
function observeRedis(client: RedisClient, { message }: Observer): void {
  for (const name of ["subscribe", "pSubscribe", "sSubscribe"]) {
    const subscribe = Reflect.get(client, name) as (...args: unknown[]) => unknown;
    Object.assign(client, {
      [name]: (channels: unknown, listener: (...args: unknown[]) => void, ...rest: unknown[]) =>
        subscribe.call(client, channels, (...args: unknown[]) => (message(), listener(...args)), ...rest),
    });
  }
}

const OPERATIONS = [
  ...(["assertExchange", "assertQueue", "bindExchange", "bindQueue", "unbindExchange", "unbindQueue"] as const),
  ...(["deleteExchange", "deleteQueue", "consume", "cancel", "publish", "sendToQueue"] as const),
];

/** Tells of everything that is asked on the connection's channels, and of every message that they get. */
function observe(connection: ChannelModel, { operation, message }: Observer): void {
  const observed = <C extends Channel>(channel: C): C => {
    for (const name of OPERATIONS) {
      const ask = channel[name] as (...args: unknown[]) => unknown;
      const tell = (...args: unknown[]) => (operation(), ask.apply(channel, args));
      Object.assign(channel, { [name]: tell });
    }
    const { consume } = channel;
    channel.consume = (queue, listener, options) =>
      consume.call(channel, queue, (delivery) => (message(), listener(delivery)), options);
    return channel;
  };
  const { createChannel, createConfirmChannel } = connection;
  connection.createChannel = async (options) => observed(await createChannel.call(connection, options));
  connection.createConfirmChannel = async (options) => observed(await createConfirmChannel.call(connection, options));
}

// ── AMQP without Socket.IO ───────────────────────────────────────────────────────────────────────────────────────────

/** The same topology and confirms, one message per packet, and nothing else. */
class BareClient implements Member {
  private constructor(
    readonly exchange: string,
    readonly queue: string,
    readonly publishing: ConfirmChannel,
    /** Several, since a channel has one request in flight. */
    readonly topology: Channel[],
  ) {}

  static async open(place: Place, { packet, ...observer }: Observer): Promise<BareClient> {
    const { prefix: exchange } = place;
    const connection = () => connectAmqp(place, { packet, ...observer });
    const [publishing, consuming] = await Promise.all([connection(), connection()]);
    const channel = await consuming.createChannel();
    await channel.assertExchange(exchange, "fanout", { durable: true });
    await channel.assertExchange(`${exchange}#keys`, "direct", { durable: true });
    await channel.bindExchange(`${exchange}#keys`, exchange, "");
    const { queue } = await channel.assertQueue("", { exclusive: true });
    await channel.consume(queue, () => packet(""), { noAck: true });
    const topology = await Promise.all(Array.from({ length: 8 }, () => consuming.createChannel()));
    return new BareClient(exchange, queue, await publishing.createConfirmChannel(), topology);
  }

  ready(): Promise<void> {
    return Promise.resolve();
  }

  async join(rooms: string[]): Promise<number> {
    const start = performance.now();
    const join = async (channel: Channel, i: number) => {
      for (const room of rooms.filter((_, r) => r % this.topology.length === i))
        await channel.bindQueue(this.queue, `${this.exchange}#keys`, `/#${room}`);
    };
    await Promise.all(this.topology.map(join));
    return performance.now() - start;
  }

  emit(rooms: string | string[], payload: Payload): void {
    const body = typeof payload === "string" ? Buffer.from(payload) : payload;
    const [key = "", ...more] = [rooms].flat().map((room) => `/#${room}`);
    this.publishing.publish(this.exchange, key, body, more.length ? { CC: more } : {}, () => {});
  }
}
