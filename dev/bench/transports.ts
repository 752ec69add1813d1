/** What is compared: this adapter, its peers, the client library alone (the floor), and no broker at all (the ceiling). */
import { EventEmitter } from "node:events";
import { createServer } from "node:http";
import { connect, type Channel, type ChannelModel, type ConfirmChannel } from "amqplib";
import { Server, type ServerOptions, type Socket } from "socket.io";

export const TRANSPORTS = {
  amqp0: "socket.io-amqp0",
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
  /** A folder for CPU profiles. */
  profile?: string | undefined;
}

/** What is told to whoever opened a member. */
export interface Observer {
  /** A client got a packet. */
  packet(): void;
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
  emit(room: string, payload: Payload): void;
}

export async function openMember(place: Place, { packet, operation }: Observer): Promise<Member> {
  const member =
    place.transport === "amqplib"
      ? await BareClient.open(place, packet)
      : new SocketServer(await ADAPTERS[place.transport](place, operation), packet);
  await member.ready();
  return member;
}

// ── Socket.IO ────────────────────────────────────────────────────────────────────────────────────────────────────────

interface Opened {
  adapter?: ServerOptions["adapter"];
  /** Resolves once the subscriptions made so far are in place, where the adapter itself does not wait for them. */
  settled?: () => Promise<unknown>;
  bound?: (io: Server) => number;
}

export class SocketServer implements Member {
  readonly http = createServer();
  readonly io: Server;
  readonly #opened: Opened;
  readonly #received: () => void;
  readonly #connections: Connection[] = [];

  constructor(opened: Opened, received: () => void) {
    this.io = new Server(this.http, opened.adapter ? { adapter: opened.adapter } : {});
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

  emit(room: string, payload: Payload): void {
    this.io.to(room).emit("event", payload);
  }

  /** How many rooms are bound on the broker now. */
  get bound(): number {
    return this.#opened.bound?.(this.io) ?? 0;
  }
}

/** As much of an Engine.IO connection as Socket.IO uses. */
class Connection extends EventEmitter {
  readonly protocol = 4;
  readonly id = crypto.randomUUID();
  readonly request = { headers: {}, connection: {}, url: "/" };
  readonly transport = { writable: true };
  readyState = "open";

  constructor(readonly received: () => void) {
    super();
  }

  /** A packet is a string, followed by its binary attachments. */
  write(part: unknown): void {
    if (typeof part === "string") this.received();
  }

  close(): void {
    this.readyState = "closed";
  }
}

const ADAPTERS: Record<Exclude<Transport, "amqplib">, (place: Place, operation: () => void) => Promise<Opened>> = {
  async amqp0({ amqp, prefix, heartbeatInterval, counted }, operation) {
    const { AmqpAdapter, createAdapter } = await import("../../index.ts");
    const amqpConnection = async () => {
      const connection = await connect(amqp);
      if (counted) observe(connection, operation);
      return connection;
    };
    const options = { amqpConnection, prefix, heartbeatInterval, heartbeatTimeout: heartbeatInterval * 2 };
    return {
      adapter: createAdapter(options),
      bound(io) {
        const adapter: unknown = io.of("/").adapter;
        return adapter instanceof AmqpAdapter ? adapter.stats.rooms : 0;
      },
    };
  },

  async redis({ redis, prefix }) {
    const { createAdapter } = await load<RedisAdapter>("@socket.io/redis-adapter@8");
    const [publishing, subscribing] = await redisClients(redis);
    return { adapter: createAdapter(publishing, subscribing, { key: prefix }), settled: () => subscribing.ping() };
  },

  async sharded({ redis, prefix }) {
    const { createShardedAdapter } = await load<RedisAdapter>("@socket.io/redis-adapter@8");
    const [publishing, subscribing] = await redisClients(redis);
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

const OPERATIONS = [
  ...(["assertExchange", "assertQueue", "bindExchange", "bindQueue", "unbindExchange", "unbindQueue"] as const),
  ...(["deleteExchange", "deleteQueue", "consume", "cancel", "publish", "sendToQueue"] as const),
];

/** Tells of everything that is asked on the connection's channels. */
function observe(connection: ChannelModel, operation: () => void): void {
  const observed = <C extends Channel>(channel: C): C => {
    for (const name of OPERATIONS) {
      const ask = channel[name] as (...args: unknown[]) => unknown;
      const tell = (...args: unknown[]) => (operation(), ask.apply(channel, args));
      Object.assign(channel, { [name]: tell });
    }
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

  static async open({ amqp, prefix }: Place, received: () => void): Promise<BareClient> {
    const exchange = `${prefix}#/`;
    const [publishing, consuming] = await Promise.all([connect(amqp), connect(amqp)]);
    const channel = await consuming.createChannel();
    await channel.assertExchange(exchange, "direct", { durable: false });
    const { queue } = await channel.assertQueue("", { exclusive: true });
    await channel.consume(queue, received, { noAck: true });
    const topology = await Promise.all(Array.from({ length: 8 }, () => consuming.createChannel()));
    return new BareClient(exchange, queue, await publishing.createConfirmChannel(), topology);
  }

  ready(): Promise<void> {
    return Promise.resolve();
  }

  async join(rooms: string[]): Promise<number> {
    const start = performance.now();
    const join = async (channel: Channel, i: number) => {
      for (const room of rooms.filter((_, r) => r % this.topology.length === i)) {
        const exchange = `${this.exchange}#${room}`;
        await Promise.all([
          channel.assertExchange(exchange, "fanout", { durable: false, autoDelete: true }),
          channel.bindQueue(this.queue, exchange, ""),
          channel.bindExchange(exchange, this.exchange, `#${room}`),
        ]);
      }
    };
    await Promise.all(this.topology.map(join));
    return performance.now() - start;
  }

  emit(room: string, payload: Payload): void {
    const body = typeof payload === "string" ? Buffer.from(payload) : payload;
    this.publishing.publish(this.exchange, `#${room}`, body, {}, () => {});
  }
}
