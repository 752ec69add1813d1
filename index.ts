/**
 * socket.io-amqp0: the Socket.IO adapter for AMQP 0-9-1 brokers (RabbitMQ and its kin), for Bun.
 *
 *   io.to("room42").emit()                                 each server that holds sockets of room42: one exclusive queue
 *          │                                                                            ▲
 *          ▼                                                                            │ bound by the first local join,
 *   exchange socket.io ───────► exchange socket.io#keys ──"/#room42", "/", "@", …────────┘ unbound by the last local leave
 *   (fanout, durable)           (direct, durable)
 *
 * Read from the top: what you call · the adapter (Socket.IO's side) · the emitter · the member (one server's place in
 * the cluster) · the AMQP side (connections, topology, outbox) · frames, values and names (pure functions).
 */
import { createHash, randomBytes, randomInt } from "node:crypto";
import type { Socket as TcpSocket } from "node:net";
import { debuglog } from "node:util";
import type { Channel, ChannelModel, ConfirmChannel, ConsumeMessage, Options, RecoveringChannelModel } from "amqplib";
import { Adapter, type BroadcastFlags, type BroadcastOptions, type Room, type SocketId } from "socket.io-adapter";

/** Set `NODE_DEBUG=socket.io-amqp0` to see what the adapter does. */
const debug = debuglog("socket.io-amqp0");

// ── What you call ────────────────────────────────────────────────────────────────────────────────────────────────────

/** What amqplib's `connect()` resolves to, recovering or not. */
export type AmqpConnection = ChannelModel | RecoveringChannelModel;

/** Which frames are kept to be sent again after a cut connection or a broker restart. */
export interface JournalOptions {
  /**
   * How many bytes of frames are kept, sent or not, before they are packed; one that is not confirmed counts 256 more. It
   * also bounds what waits while the broker is away or blocked: beyond it the oldest frames are dropped, counted in
   * `stats.lost` and reported as an `error`.
   * @default 16_777_216 (16 MiB)
   */
  bytes?: number;
  /**
   * For how many ms a frame is kept: the longest outage that loses nothing. Give all servers the same.
   * @default 60_000
   */
  ms?: number;
}

/** What a member of the cluster needs, be it a server or an emitter. */
interface MemberOptions {
  /**
   * Opens a connection, as `() => connect("amqp://localhost")`. It is called for two connections per Socket.IO server
   * (one consumes, one publishes, for RabbitMQ blocks publishers when it runs low on memory or disk), and again after a
   * loss: after 100 ms doubling to 1 s, or to 10 s where the broker refuses, less up to a half. Each call must return a
   * connection of its own, which the adapter closes. Give it a `heartbeat` (seconds, `amqp://localhost?heartbeat=5`) to notice a dead link in twice the time.
   */
  amqpConnection: () => AmqpConnection | Promise<AmqpConnection>;
  /**
   * What the names of all exchanges and queues begin with; servers with different prefixes do not meet.
   * @default "socket.io"
   */
  prefix?: string;
  /**
   * The largest packet, in bytes. A larger one is still delivered locally, and reported as an `error`. The broker has a
   * limit of its own (RabbitMQ 4: `max_message_size`, 16 MiB; RabbitMQ 3: 128 MiB), which must not be smaller.
   * @default 16_777_216 (16 MiB)
   */
  maxPayload?: number;
  /** How much is kept to be sent again after an outage. */
  journal?: JournalOptions;
}

export interface AdapterOptions extends MemberOptions {
  /**
   * Whether a room gets an exchange of its own, `<prefix>#<namespace>#<room>`, to which other AMQP clients can publish and
   * bind. `undefined` means: before RabbitMQ 4.2, on a server with up to 100 rooms. From 4.2 on no room has one, and `true` is
   * refused with an error: an exchange that comes and goes with its bindings destroys RabbitMQ's metadata store there.
   * `false` means that no room has one. Servers of all kinds work together.
   * @default undefined
   */
  roomExchanges?: boolean | undefined;
  /**
   * How rooms travel  /**
   * How rooms travel that are named like a socket id (20 characters of `A-Z a-z 0-9 _ -`): `"shared"` sends their
   * packets to every server of the namespace, so that a connecting client costs the broker nothing; `"bound"` binds them
   * like any room. Must be the same on all servers.
   * @default "shared"
   */
  socketRooms?: "shared" | "bound";
  /**
   * How long `fetchSockets()` and `serverSideEmit()` wait for the other servers, and `io.close()` for the broker, in ms.
   * @default 5_000
   */
  requestsTimeout?: number;
  /**
   * How often a server tells the others that it is alive, in ms.
   * @default 5_000
   */
  heartbeatInterval?: number;
  /**
   * After how many ms of silence a server is no longer counted or waited for. One whose queue is gone (closed, killed,
   * crashed) is noticed in milliseconds, without this.
   * @default 10_000
   */
  heartbeatTimeout?: number;
  /**
   * Arguments for the server's queue. With a limit of its length the broker drops messages, and nobody hears of it.
   * @default {}
   */
  queueArguments?: Record<string, unknown>;
}

export interface EmitterOptions extends MemberOptions {
  /** Called with what a user should know: a lost connection, a refused permission, a packet that could not be sent. */
  onError?: (error: Error) => void;
}

/** A snapshot of what the adapter has done. Frames and packets are the whole server's, not only this namespace's. */
export interface AdapterStats {
  /** Whether both connections are up. */
  connected: boolean;
  /** Rooms of this namespace that are bound on the broker. */
  rooms: number;
  framesSent: number;
  framesReceived: number;
  packetsSent: number;
  packetsReceived: number;
  /** Frames that peers sent again, and that this server had missed or held back until then. */
  replayed: number;
  /** Frames that came a second time, after an outage, and were dropped. */
  duplicates: number;
  /**
   * Frames that a journal no longer held: own ones without a confirm, and missed ones of peers, if they do not count them;
   * and own ones that the broker refused as too large.
   */
  lost: number;
  journalBytes: number;
  /** Frames under way or waiting, and those confirmed behind one that is. */
  unconfirmed: number;
  reconnects: { consuming: number; publishing: number };
  lastError: Error | undefined;
}

/**
 * The adapter for `io.adapter(…)` or `new Server({ adapter: … })`. One result may serve several servers.
 * @throws TypeError if an option is wrong
 */
export function createAdapter(options: AdapterOptions): (nsp: Namespace) => AmqpAdapter {
  const settings = checked(options, ADAPTER_OPTIONS);
  const members = new WeakMap<object, Member>();
  // A function, not an arrow: Socket.IO calls it with `new`.
  return function (nsp: Namespace): AmqpAdapter {
    let member = members.get(nsp.server);
    // A server that was closed stays closed, until it is given an adapter anew.
    if (!member || (member.closing && nsp.name === "/")) members.set(nsp.server, (member = new Member(settings)));
    return new AmqpAdapter(nsp, member, settings);
  };
}

/**
 * Emits to the clients of a cluster from a process that is no Socket.IO server.
 *
 *     const emitter = createEmitter({ amqpConnection: () => connect("amqp://localhost") });
 *     emitter.to("room42").emit("hello", "world");
 *     await emitter.close();
 *
 * @throws TypeError if an option is wrong
 */
export function createEmitter<Events extends EventMap<Events> = AnyEvents>(options: EmitterOptions): Emitter<Events> {
  const { onError, ...rest } = checked(options, EMITTER_OPTIONS);
  return new Emitter<Events>(new Member(rest, onError));
}

type Settings = Required<Omit<AdapterOptions, "journal" | "roomExchanges">> & {
  journal: Required<JournalOptions>;
  roomExchanges?: boolean | undefined;
};
type Expectation = [expected: string, meets: (value: unknown) => boolean];

const MiB = 1024 * 1024;
const ADAPTER_DEFAULTS = {
  prefix: "socket.io",
  socketRooms: "shared" as const,
  requestsTimeout: 5_000,
  heartbeatInterval: 5_000,
  heartbeatTimeout: 10_000,
  queueArguments: {},
  maxPayload: 16 * MiB,
  journal: { bytes: 16 * MiB, ms: 60_000 },
};

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);
const isFunction = (value: unknown): boolean => typeof value === "function";
const positive = (value: unknown): boolean => typeof value === "number" && value > 0 && value < 2 ** 31;
const milliseconds: Expectation = ["a positive number of ms below 2^31", positive];
const bytes: Expectation = [
  "a positive number of bytes below 2^30",
  (value) => positive(value) && Number(value) < 2 ** 30,
];

const MEMBER_OPTIONS: Record<string, Expectation> = {
  amqpConnection: ['a function that returns a connection, as () => connect("amqp://localhost")', isFunction],
  prefix: [
    'a string of 1 to 100 bytes without "#" that does not begin with "amq."',
    (value) => typeof value === "string" && /^(?!amq\.)[^#]+$/.test(value) && Buffer.byteLength(value) <= 100,
  ],
  maxPayload: bytes,
  journal: [
    "{ bytes?, ms? }, positive numbers below 2^31",
    (value) =>
      isRecord(value) &&
      Object.entries(value).every(([key, n]) => (key === "bytes" || key === "ms") && (n === undefined || positive(n))),
  ],
};
const ADAPTER_OPTIONS: Record<string, Expectation> = {
  ...MEMBER_OPTIONS,
  roomExchanges: ["true or false", (value) => typeof value === "boolean"],
  socketRooms: ['"shared" or "bound"', (value) => value === "shared" || value === "bound"],
  requestsTimeout: milliseconds,
  heartbeatInterval: milliseconds,
  heartbeatTimeout: milliseconds,
  queueArguments: ["an object", isRecord],
};
const EMITTER_OPTIONS: Record<string, Expectation> = { ...MEMBER_OPTIONS, onError: ["a function", isFunction] };

function withoutUndefined<T extends object>(options: T): T {
  const given = { ...options };
  for (const name in given) if (given[name] === undefined) delete given[name];
  return given;
}

/** The options with their defaults. Throws a TypeError for the first one that is wrong. */
function checked<T extends MemberOptions>(options: T, expectations: Record<string, Expectation>): Settings & T {
  const refusal = (name: string, expected: string, value: unknown) =>
    new TypeError(`Expected ${name} to be ${expected}, got ${Bun.inspect(value)} (${typeof value})`);
  if (!isRecord(options)) throw refusal("the options", "an object with amqpConnection", options);
  const given = withoutUndefined(options);
  for (const [name, value] of [["amqpConnection", given.amqpConnection] as const, ...Object.entries(given)]) {
    const expectation = expectations[name];
    if (!expectation) throw refusal("the options", `of ${Object.keys(expectations).join(", ")}`, name);
    if (!expectation[1](value)) throw refusal(name, expectation[0], value);
  }
  const journal = { ...ADAPTER_DEFAULTS.journal, ...withoutUndefined(given.journal ?? {}) };
  const settings = { ...ADAPTER_DEFAULTS, ...given, journal };
  if (settings.heartbeatTimeout <= settings.heartbeatInterval)
    throw refusal(
      "heartbeatTimeout",
      `more than heartbeatInterval (${settings.heartbeatInterval})`,
      settings.heartbeatTimeout,
    );
  return settings;
}

// ── The adapter ──────────────────────────────────────────────────────────────────────────────────────────────────────

/** What the adapter uses of Socket.IO's classes, which socket.io-adapter types as `any`. */
interface Namespace {
  readonly name: string;
  readonly adapter?: unknown;
  readonly server: {
    readonly encoder: { encode(packet: Packet): unknown[] };
    readonly _parser: { Decoder: new (options?: object) => Decoder };
  };
  _onServerSideEmit(args: unknown[]): void;
}
interface Decoder {
  on(event: "decoded", listener: (packet: Packet) => void): unknown;
  add(part: unknown): void;
  destroy(): void;
}
interface Socket {
  readonly id: SocketId;
  readonly rooms: Set<Room>;
  readonly handshake: Record<string, unknown>;
  readonly data: unknown;
  readonly client: { writeToEngine(parts: unknown[], flags: object): void };
  listenersAnyOutgoing?(): unknown[];
  notifyOutgoingListeners?(packet: Packet): void;
}
interface Packet {
  type: number;
  nsp: string;
  data: unknown[];
  id?: number;
}

/** The Socket.IO protocol's type of an event, https://socket.io/docs/v4/socket-io-protocol/#packet-types */
const EVENT = 2;
/** Names that Socket.IO keeps for itself: a client's parser refuses the packet and closes its connection. */
const RESERVED_EVENTS = new Set([
  "connect",
  "connect_error",
  "disconnect",
  "disconnecting",
  "newListener",
  "removeListener",
]);

/** The one place that reaches for a private method: only `apply` knows how `rooms` and `except` pick local sockets. */
const apply: (this: Adapter, opts: BroadcastOptions, callback: (socket: Socket) => void) => void =
  Adapter.prototype["apply"];

/**
 * One namespace of one server. It emits `error` (an `Error`) for what a user should know, where somebody listens: a lost
 * connection, a refused permission, a message that could not be sent or read.
 */
export class AmqpAdapter extends Adapter implements Tenant {
  /** @internal The routing key of what is for everyone in this namespace. */
  readonly key: string;
  declare readonly nsp: Namespace;
  /** Resolves once connected, bound and announced; rejects if the adapter is closed before. */
  readonly ready: Promise<void>;
  /** @internal */
  readonly opened = Promise.withResolvers<void>();
  readonly #member: Member;
  readonly #settings: Settings;
  readonly #routes: Routes;
  /** Whether a room has a routing key of its own. */
  readonly #travels: (room: Room) => boolean;
  #closing: Promise<void> | undefined;
  /** The adapter that this one takes the place of: Socket.IO does not close it. */
  #replaced: AmqpAdapter | undefined;

  /** Made by what `createAdapter()` returns. */
  constructor(nsp: Namespace, member: Member, settings: Settings) {
    super(nsp);
    this.#member = member;
    this.#settings = settings;
    this.key = namespaceKey(nsp.name);
    const bound = settings.socketRooms === "bound";
    this.#travels = (room) => bound || !isSocketId(room);
    this.#routes = new Routes(nsp.name, member.names, bound);
    this.ready = this.opened.promise;
    this.ready.catch(() => {}); // rejects only on close(), which nobody has to await
    this.#replaced = nsp.adapter instanceof AmqpAdapter ? nsp.adapter : undefined;
  }

  get stats(): AdapterStats {
    return { ...this.#member.stats, rooms: this.#member.countBound(this.keys()) };
  }

  override init(): void {
    this.#member.join(this);
    void this.#replaced?.close();
    this.#replaced = undefined;
  }

  override close(): Promise<void> {
    return (this.#closing ??= this.#member.leave(this));
  }

  override serverCount(): Promise<number> {
    return Promise.resolve(1 + this.#member.peersOf(this.nsp.name).length);
  }

  // Rooms: what is bound on the broker follows `this.rooms`.

  /** @internal The routing keys of its rooms. */
  keys(): Iterable<string> {
    return this.rooms
      .keys()
      .filter(this.#travels)
      .map((room) => roomKey(this.nsp.name, room));
  }

  /** @internal The rooms whose packets travel under a key. */
  roomsUnder(key: string): Room[] {
    if (key.startsWith(HASHED)) return [...this.rooms.keys()].filter((room) => roomKey(this.nsp.name, room) === key);
    if (!key.startsWith(`${this.key}#`)) return [];
    return roomsNamed(key.slice(this.key.length + 1)).filter((room) => this.rooms.has(room));
  }

  /** Resolves once every later emit anywhere reaches the socket; returns at once while the broker is away. */
  override addAll(id: SocketId, rooms: Set<Room>): Promise<void> | void {
    super.addAll(id, rooms);
    return this.#follow(rooms);
  }

  override del(id: SocketId, room: Room): void {
    super.del(id, room);
    void this.#follow([room]);
  }

  override delAll(id: SocketId): void {
    const rooms = this.sids.get(id);
    super.delAll(id);
    if (rooms) void this.#follow(rooms);
  }

  #follow(rooms: Iterable<Room>): Promise<void> | void {
    let pending: Promise<void>[] | undefined;
    for (const room of rooms) {
      const done = this.#travels(room) ? this.#member.follow(roomKey(this.nsp.name, room)) : undefined;
      if (done) (pending ??= []).push(done);
    }
    if (pending) return Promise.all(pending).then(() => {});
  }

  // Packets: encoded once, delivered locally first.

  override broadcast(packet: Packet, opts: BroadcastOptions): void {
    packet.nsp = this.nsp.name;
    const parts = this.nsp.server.encoder.encode(packet);
    this.#write(this.#sockets(opts), [parts], opts.flags, packet);
    if (!opts.flags?.local && !this.#closing) this.#member.outbox.add(this.#routes.packets(opts), parts);
  }

  /** @internal Packets of one frame: encoded by the peer, handed to the local sockets as they are. */
  onPackets({ opts }: PacketsHead, frame: Frame): void {
    const sockets = this.#sockets(opts);
    if (sockets.length > 0) this.#write(sockets, packetsOf(frame), opts.flags);
  }

  #sockets(opts: BroadcastOptions): Socket[] {
    const sockets: Socket[] = [];
    apply.call(this, opts, (socket) => sockets.push(socket));
    return sockets;
  }

  #write(sockets: Socket[], packets: unknown[][], flags: BroadcastFlags = {}, decoded?: Packet): void {
    if (sockets.length === 0) return;
    const options = { preEncoded: true, volatile: flags.volatile, compress: flags.compress };
    for (const parts of packets) {
      let packet = decoded;
      for (const socket of sockets) {
        if (socket.listenersAnyOutgoing?.().length) {
          try {
            socket.notifyOutgoingListeners?.((packet ??= this.#decode(parts)));
          } catch (error) {
            if (decoded) throw error; // into the emit() of the user who can mend it
            this.report(new Error(`An outgoing listener threw: ${asError(error).message}`, { cause: error }));
          }
        }
        socket.client.writeToEngine(parts, options);
      }
    }
  }

  #decode(parts: unknown[]): Packet {
    const decoder = new this.nsp.server._parser.Decoder({ maxAttachments: Infinity });
    let packet: Packet | undefined;
    decoder.on("decoded", (decoded) => (packet = decoded));
    for (const part of parts) decoder.add(part);
    decoder.destroy();
    if (!packet) throw new FrameError(`a packet of ${parts.length} parts that the parser does not understand`);
    return packet;
  }

  override broadcastWithAck(
    packet: Packet,
    opts: BroadcastOptions,
    clientCountCallback: (clientCount: number) => void,
    ack: (...args: unknown[]) => void,
  ): void {
    const peers = this.#member.peersOf(this.nsp.name);
    if (opts.flags?.local || this.#closing) {
      for (const _ of peers) clientCountCallback(0); // the caller waits for one count per server
    } else {
      // A peer is counted when the last of its clients has answered or when it is gone, so a dead one is not waited for.
      const clients = new Map(peers.map((uid) => [uid, { count: Infinity, acks: 0 }]));
      const send = (id: number) => this.#send({ type: "broadcast", id, opts: toWire(opts), data: packet.data });
      void this.#member.request(peers, opts.flags?.timeout ?? this.#settings.requestsTimeout, send, {
        take: (message, uid) => {
          const peer = clients.get(uid);
          if (!peer) return false;
          if (message.type === "clients") peer.count = message.count;
          if (message.type === "ack") {
            peer.acks++;
            ack(message.value);
          }
          return peer.acks >= peer.count;
        },
        // Not here: it may call the user, who may throw.
        done: (uid) => queueMicrotask(() => clientCountCallback(clients.get(uid)?.acks ?? 0)),
      });
    }
    super.broadcastWithAck(packet, opts, clientCountCallback, ack);
  }

  // Sockets and servers: local first, then a message to the servers that hold the rooms, or to all.

  override addSockets(opts: BroadcastOptions, rooms: Room[]): void {
    super.addSockets(opts, rooms);
    if (!opts.flags?.local) this.#send({ type: "join", opts: toWire(opts), rooms });
  }

  override delSockets(opts: BroadcastOptions, rooms: Room[]): void {
    super.delSockets(opts, rooms);
    if (!opts.flags?.local) this.#send({ type: "leave", opts: toWire(opts), rooms });
  }

  override disconnectSockets(opts: BroadcastOptions, close: boolean): void {
    super.disconnectSockets(opts, close);
    if (!opts.flags?.local) this.#send({ type: "disconnect", opts: toWire(opts), close });
  }

  override async fetchSockets(opts: BroadcastOptions): Promise<unknown[]> {
    const sockets: unknown[] = this.#sockets(opts);
    const peers = opts.flags?.local ? [] : this.#member.peersOf(this.nsp.name);
    const send = (id: number) => this.#send({ type: "fetch", id, opts: toWire(opts) });
    const missing = await this.#member.request(peers, opts.flags?.timeout ?? this.#settings.requestsTimeout, send, {
      take: (message) => {
        if (message.type !== "sockets") return false;
        for (const socket of message.sockets) sockets.push(socket);
        return !message.more;
      },
    });
    if (missing > 0) throw new Error(`fetchSockets: ${missing} of ${peers.length} servers did not answer in time`);
    return sockets;
  }

  override serverSideEmit(args: unknown[]): void {
    const callback = args.at(-1);
    if (typeof callback !== "function") return this.#send({ type: "emit", id: undefined, args });
    const peers = this.#member.peersOf(this.nsp.name);
    const answers: unknown[] = [];
    const send = (id: number) => this.#send({ type: "emit", id, args: args.slice(0, -1) });
    const answered = this.#member.request(peers, this.#settings.requestsTimeout, send, {
      take: (message) => {
        if (message.type !== "answer") return false;
        answers.push(message.value);
        return true;
      },
    });
    void answered.then((missing) => {
      const late = `serverSideEmit: ${missing} of ${peers.length} servers did not answer in time`;
      // Not here: what it throws is the user's, and no rejection.
      queueMicrotask(() => callback(missing > 0 ? new Error(late) : null, answers));
    });
  }

  #send(message: Message): void {
    if (!this.#closing) this.#member.outbox.add(this.#routes.message(message), encodeValue(message));
  }

  /** @internal A message of a peer, an emitter or a foreign client. */
  onMessage(message: Message, from: string): void {
    const answer = (value: Answer) => this.#member.outbox.add(this.#routes.direct(from), encodeValue(value));
    switch (message.type) {
      case "packet":
        return super.broadcast(
          { type: EVENT, nsp: this.nsp.name, data: eventOf(message.data) },
          fromWire(message.opts),
        );
      case "join":
        return super.addSockets(fromWire(message.opts), message.rooms);
      case "leave":
        return super.delSockets(fromWire(message.opts), message.rooms);
      case "disconnect":
        return super.disconnectSockets(fromWire(message.opts), message.close);
      case "emit": {
        if (message.id === undefined) return this.nsp._onServerSideEmit(message.args);
        const { id } = message;
        let answered = false;
        const callback = (value: unknown) => {
          if (!answered) answer({ type: "answer", id, value });
          answered = true;
        };
        return this.nsp._onServerSideEmit([...message.args, callback]);
      }
      case "fetch": {
        const { id } = message;
        let sockets: unknown[] = [];
        let size = 0;
        for (const socket of this.#sockets(fromWire(message.opts))) {
          const details = this.#details(socket);
          if (sockets.length > 0 && size + details.size > this.#settings.maxPayload / 4) {
            answer({ type: "sockets", id, sockets, more: true });
            sockets = [];
            size = 0;
          }
          sockets.push(details.value);
          size += details.size;
        }
        return answer({ type: "sockets", id, sockets, more: false });
      }
      case "broadcast":
        return super.broadcastWithAck(
          { type: EVENT, nsp: this.nsp.name, data: eventOf(message.data) },
          fromWire(message.opts),
          (count) => answer({ type: "clients", id: message.id, count }),
          (value: unknown) => answer({ type: "ack", id: message.id, value }),
        );
      default:
        this.#member.onAnswer(message, from);
    }
  }

  /** What a peer learns of a local socket, and about how long it is. Data that cannot be sent is left out and reported. */
  #details({ id, handshake, rooms, data }: Socket): { value: unknown; size: number } {
    const { sessionStore: _, ...rest } = handshake; // may hold circular references
    const details = { id, handshake: rest, rooms: [...rooms], data };
    const { maxPayload } = this.#settings;
    try {
      const size = encodedLength(details);
      if (size > maxPayload / 4) throw new RangeError(`${size} bytes are too much for a maxPayload of ${maxPayload}`);
      return { value: details, size };
    } catch (error) {
      this.report(new Error(`The data of socket ${id} cannot be sent to another server: ${asError(error).message}`));
      const value = { id, handshake: { headers: {}, query: {}, auth: {} }, rooms: [...rooms], data: {} };
      return { value, size: encodedLength(value) };
    }
  }

  /** @internal */
  report(error: Error): void {
    // In a turn of its own: a listener that throws must not break what is reported on, and one that is added right
    // after the adapter was made hears of a first connection that fails at once.
    queueMicrotask(() => this.listenerCount("error") > 0 && this.emit("error", error));
  }
}

/** An event from elsewhere, or a FrameError where the clients' parsers would refuse it and drop their connections. */
function eventOf(data: unknown[]): unknown[] {
  if (typeof data[0] === "string" && !RESERVED_EVENTS.has(data[0])) return data;
  throw new FrameError(`an event named ${JSON.stringify(data[0])}; expected a string that is not reserved`);
}

// ── The emitter ──────────────────────────────────────────────────────────────────────────────────────────────────────

/** The events of an emitter: an interface or type whose members are functions. */
export type EventMap<T> = { [K in keyof T]: (...args: never[]) => void };
type AnyEvents = Record<string, (...args: unknown[]) => void>;
type Rooms = Room | Room[];

/** Made by `createEmitter()`. `of()`, `to()`, `except()` and the flags return a new one; all share the connections. */
export class Emitter<Events extends EventMap<Events> = AnyEvents> {
  readonly #member: Member;
  readonly #routes: Routes;
  readonly #opts: Required<BroadcastOptions>;

  /** Made by `createEmitter()`. */
  constructor(
    member: Member,
    routes = new Routes("/", member.names, false),
    opts: Required<BroadcastOptions> = { rooms: new Set(), except: new Set(), flags: {} },
  ) {
    this.#member = member;
    this.#routes = routes;
    this.#opts = opts;
    if (!member.started) member.start();
  }

  /** Resolves once connected; rejects if the emitter is closed before. */
  get ready(): Promise<void> {
    return this.#member.opened.promise;
  }

  /** An emitter for another namespace. */
  of(nsp: string): Emitter<Events> {
    const name = nsp.startsWith("/") ? nsp : `/${nsp}`;
    return new Emitter<Events>(this.#member, new Routes(name, this.#member.names, false));
  }

  /** Adds rooms; a client in several of them gets the packet once. */
  to(rooms: Rooms): Emitter<Events> {
    return this.#with({ rooms: new Set([...this.#opts.rooms, ...[rooms].flat()]) });
  }

  /** The same as `to()`. */
  in(rooms: Rooms): Emitter<Events> {
    return this.to(rooms);
  }

  /** Leaves out the clients of these rooms. */
  except(rooms: Rooms): Emitter<Events> {
    return this.#with({ except: new Set([...this.#opts.except, ...[rooms].flat()]) });
  }

  /** Packets that may be dropped: where a client is not ready for them, and while the broker is away. */
  get volatile(): Emitter<Events> {
    return this.#with({ flags: { ...this.#opts.flags, volatile: true } });
  }

  /** Whether to compress what is sent to the clients. */
  compress(compress: boolean): Emitter<Events> {
    return this.#with({ flags: { ...this.#opts.flags, compress } });
  }

  /**
   * Emits to the clients.
   * @throws Error if the event's name is reserved, TypeError if an argument cannot be encoded as JSON with binary
   */
  emit<Name extends keyof Events & string>(name: Name, ...args: Parameters<Events[Name]>): true {
    if (RESERVED_EVENTS.has(name)) throw new Error(`"${name}" is a reserved event name`);
    return this.#send({ type: "packet", opts: toWire(this.#opts), data: [name, ...args] });
  }

  socketsJoin(rooms: Rooms): void {
    this.#send({ type: "join", opts: toWire(this.#opts), rooms: [rooms].flat() });
  }

  socketsLeave(rooms: Rooms): void {
    this.#send({ type: "leave", opts: toWire(this.#opts), rooms: [rooms].flat() });
  }

  /** Disconnects the matching sockets; with `close`, their underlying connections as well. */
  disconnectSockets(close = false): void {
    this.#send({ type: "disconnect", opts: toWire(this.#opts), close });
  }

  /** Emits to the servers themselves: `io.on(name, …)`. There are no answers. */
  serverSideEmit(name: string, ...args: unknown[]): void {
    if (typeof args.at(-1) === "function")
      throw new TypeError("An emitter cannot wait for answers; leave out the callback");
    this.#send({ type: "emit", id: undefined, args: [name, ...args] });
  }

  /**
   * Resolves when the broker has confirmed everything; rejects if it has not within 5 s. Closes the connections, which all
   * emitters derived from the same one share.
   */
  async close(): Promise<void> {
    await this.#member.close(5_000);
  }

  #with(opts: Partial<Required<BroadcastOptions>>): Emitter<Events> {
    return new Emitter<Events>(this.#member, this.#routes, { ...this.#opts, ...opts });
  }

  #send(message: Message): true {
    if (this.#member.closing) throw new Error("The emitter is closed");
    this.#member.outbox.add(this.#routes.message(message), encodeValue(message));
    return true;
  }
}

// ── The member: one server's (or emitter's) place in the cluster ─────────────────────────────────────────────────────

/** A namespace of this server, as its member sees it. */
interface Tenant extends RoomOwner {
  readonly nsp: { readonly name: string };
  /** Settled when the namespace is bound and announced, or closed. */
  readonly opened: PromiseWithResolvers<void>;
  onPackets(head: PacketsHead, frame: Frame): void;
  onMessage(message: Message, from: string): void;
  report(error: Error): void;
}

/** Another server or emitter that has been heard of. */
interface Peer {
  readonly uid: string;
  /** When it was last heard (ms, monotonic). */
  seen: number;
  /** When it last said hello (ms, monotonic), which it does once its queue is bound; -Infinity for a stranger. */
  greeted: number;
  /** What it has open; undefined until it has said so, and once its queue is gone. */
  namespaces?: Set<string> | undefined;
  /** How often that had changed, by its last hello. */
  revision: number;
  /** The latest frames taken. */
  readonly recent: Recent;
  /** Up to this number nothing more is expected: it has come, was for others, or counts as lost; NaN until it is known. */
  sure: number;
  /** The position in its latest heartbeat. `sure` follows once the next one is not lower, for it might be forged. */
  position: number;
  /** Set while frames may be missing, until the peer has sent them again. */
  gap?: Gap | undefined;
}

/** Number and CRC-32 of a frame that was taken: proves to its sender that it was this frame. */
type Taken = [number: number, digest: number];

/** The latest frames taken. The oldest makes room. */
class Recent {
  /** Where each number stands last in the rings. Rings, for a Map finds its first key the later, the more it has lost. */
  readonly #places = new Map<number, number>();
  readonly #numbers: number[] = [];
  readonly #digests: number[] = [];
  readonly #times: number[] = [];
  #next = 0;

  /** Whether it is new; `at` is when it was taken (ms, monotonic). */
  add({ number, body }: Frame, at: number): boolean {
    const digest = Bun.hash.crc32(body);
    // Several frames may have the number, if somebody forges them.
    const isThis = (taken: number, place: number) => taken === number && this.#digests[place] === digest;
    if (this.#places.has(number) && this.#numbers.some(isThis)) return false;
    const place = this.#next;
    const oldest = this.#numbers[place];
    if (oldest !== undefined && this.#places.get(oldest) === place) this.#places.delete(oldest);
    this.#numbers[place] = number;
    this.#digests[place] = digest;
    this.#times[place] = at;
    this.#places.set(number, place);
    this.#next = (place + 1) % RECENT;
    return true;
  }

  has(number: number): boolean {
    return this.#places.has(number);
  }

  /** Whether most of what is remembered has higher numbers: it is no news. */
  isOld(number: number): boolean {
    if (this.#numbers.length < RECENT) return false;
    return this.#numbers.reduce((later, taken) => later + Number(taken > number), 0) > RECENT / 2;
  }

  /** Whether a frame with a lower number was taken after that time. */
  tookBelow(number: number, since: number): boolean {
    return this.#numbers.some((taken, place) => taken < number && this.#times[place]! > since);
  }

  /** The latest ones with numbers below this one. */
  evidence(below: number): Taken[] {
    const evidence: Taken[] = [];
    for (let i = 1; i <= this.#numbers.length && evidence.length < EVIDENCE; i++) {
      const place = (this.#next - i + RECENT) % RECENT;
      const number = this.#numbers[place]!;
      if (number < below) evidence.push([number, this.#digests[place]!]);
    }
    return evidence;
  }
}

/** What is asked of a peer after a gap, and what waits until it has answered. */
interface Gap {
  /** Of the question. */
  id: number;
  /** The frame that is missing, and the one that says so; undefined if only an outage is the reason, when any may be. */
  readonly missing: number | undefined;
  readonly seen: number | undefined;
  /** How many frames of the answer have come; undefined before it has begun. */
  came: number | undefined;
  /** The first and last number that the answer covers; from Infinity, before it has begun. */
  from: number;
  to: number;
  /** Frames that came in the meantime. */
  held: Frame[];
  heldBytes: number;
  /** Whether they were too many to be held, so that the last ones were not. */
  overflowed: boolean;
  /** Since when they wait without a word of the answer. */
  heldSince: number | undefined;
  askAt: number;
}

interface Request {
  readonly missing: Set<string>;
  /** Takes an answer; true once that peer has said all. */
  readonly take: (message: Answer, from: string) => boolean;
  /** A peer has said all, or is gone. */
  readonly done?: ((uid: string) => void) | undefined;
  readonly end: (missing: number) => void;
}

/** At least this long between two announcements (ms), for a thousand namespaces that open one after the other. */
const ANNOUNCE_INTERVAL = 20;
/** How often peers that owe an answer are asked whether they are there, in ms. */
const PROBE_INTERVAL = 100;
/** After how many ms a peer is asked again for what was missed. */
const ASK_AGAIN = 500;
/** How many ms after a queue has gone the rooms' exchanges are bound again. */
const RENEW_AFTER = 2_000;
/** How many replayed frames may be unconfirmed. */
const REPLAY_WINDOW = 64;
/**
 * How many frames of each peer are remembered: more than the `IN_FLIGHT` bytes hold that it sends again when it has lost its
 * connection.
 */
const RECENT = 4_096;
/** How many of them a question names. */
const EVIDENCE = 64;
/** What nobody guesses. */
const questionId = (): number => randomInt(2 ** 47);
/** How many peers are remembered at most, so that forged ids cannot fill the memory. */
const MAX_PEERS = 10_000;

/** Owns the connections, the queue and the numbers that a server shares between all its namespaces. */
class Member {
  readonly uid = randomBytes(6).toString("base64url"); // 8 characters: what a frame's header has room for
  readonly names: Names;
  readonly outbox: Outbox;
  /** Connected, bound and announced for the first time. */
  readonly opened = Promise.withResolvers<void>();
  started = false;
  closing: Promise<void> | undefined;
  /** What the queue of the present connection is bound to. */
  #topology: Topology | undefined;
  /** Resolves when the connection that is being opened is live or has failed. */
  #opening: PromiseWithResolvers<void> | undefined;
  readonly #tenants = new Map<string, Tenant>();
  readonly #peers = new Map<string, Peer>();
  /** Those of them that have a gap. */
  readonly #gapped = new Set<Peer>();
  readonly #requests = new Map<number, Request>();
  /** The latest question of each peer, and when it had been answered (ms, monotonic; Infinity until then). */
  readonly #replaying = new Map<string, { readonly id: number; endedAt: number }>();
  /** What is being sent again: a closing server finishes it. */
  readonly #replays = new Set<Promise<void>>();
  /** Senders whose version has been reported. */
  readonly #reportedVersions = new Set<string>();
  readonly #consuming: Link;
  readonly #publishing: Link;
  #ids = 0;
  /** How often the queue was made, and the set of namespaces changed. */
  #generation = 0;
  #revision = 0;
  #announcement: Promise<void> | undefined;
  #unannounced = false;
  /** Whether the next announcement asks the others for theirs. */
  #greeting = false;
  /** When the queue last delivered something (ms, monotonic); NaN before the first connection. */
  #heard = NaN;
  /**
   * When this server was back after an outage (ms, monotonic), and Infinity until it is: for a journal's time, strangers may
   * have been missed.
   */
  #back: number | undefined;
  #heartbeat: Timeout | undefined;
  #probing: Timeout | undefined;
  #renewal: Timeout | undefined;
  /** Whether another queue has gone since that timer was set. */
  #renewAgain = false;
  #asking: Timeout | undefined;
  #counts = { framesReceived: 0, packetsReceived: 0, replayed: 0, duplicates: 0 };
  #lostOfPeers = 0;
  #lastError: Error | undefined;

  constructor(
    readonly settings: Settings,
    readonly onError?: (error: Error) => void,
  ) {
    this.names = new Names(settings.prefix);
    this.opened.promise.catch(() => {}); // rejects only on close(), which nobody has to await
    const report = (error: Error) => this.#report(error);
    const settled = () => {
      this.#greeting = true;
      void this.#announce();
      this.#ask();
    };
    // Not in amqplib's turn: it would answer a user's callback that throws by closing the channel.
    const unreachable = (uid: string) => queueMicrotask(() => this.#unreachable(uid));
    this.outbox = new Outbox(this.uid, this.names, settings, { report, unreachable, ready: settled });
    this.#consuming = new Link("consuming", settings.prefix, settings.amqpConnection, report, {
      up: (model, lose) => this.#consume(model, lose),
      settled,
      down: () => {
        this.#topology?.end();
        this.#topology = undefined;
        this.#opening?.resolve();
        this.#opening = undefined;
      },
    });
    this.#publishing = new Link("publishing", settings.prefix, settings.amqpConnection, report, {
      up: (model, lose) => this.outbox.up(model, lose),
      settled,
      down: (error) => this.outbox.down(error),
    });
  }

  get stats(): Omit<AdapterStats, "rooms"> {
    const reconnects = (link: Link) => Math.max(0, link.connects - 1);
    return {
      connected: this.#consuming.connected && this.#publishing.connected,
      ...this.#counts,
      ...this.outbox.stats,
      lost: this.#lostOfPeers + this.outbox.dropped,
      reconnects: { consuming: reconnects(this.#consuming), publishing: reconnects(this.#publishing) },
      lastError: this.#lastError,
    };
  }

  start(): void {
    this.started = true;
    this.#opening = Promise.withResolvers<void>();
    this.#consuming.start();
    this.#publishing.start();
    this.#heartbeat = setInterval(() => this.#beat(), this.settings.heartbeatInterval);
  }

  /** A namespace opens. The first one starts the connections. */
  join(tenant: Tenant): void {
    if (this.closing) return tenant.opened.reject(new Error("The server has been closed"));
    const replaced = this.#tenants.get(tenant.nsp.name);
    this.#tenants.set(tenant.nsp.name, tenant);
    if (!this.started) return this.start();
    for (const key of replaced?.keys() ?? []) void this.follow(key);
    void Promise.resolve(this.follow(tenant.key)).then(() => this.#announce());
  }

  /**
   * Binds or unbinds a routing key as the rooms want it. Resolves when a key that is wanted is live, at once while the broker
   * is away.
   */
  follow(key: string): Promise<void> | undefined {
    return this.#topology ? this.#topology.follow(key) : this.#opening?.promise;
  }

  /** How many of these keys are bound. */
  countBound(keys: Iterable<string>): number {
    let count = 0;
    for (const key of keys) if (this.#topology?.bindings.bound.has(key)) count++;
    return count;
  }

  /** A namespace closes. The last one closes the connections. */
  async leave(tenant: Tenant): Promise<void> {
    const { name } = tenant.nsp;
    tenant.opened.reject(new Error(`The adapter of ${name} was closed before it was ready`));
    if (this.#tenants.get(name) !== tenant) return; // it has been replaced
    if (this.#tenants.size === 1) {
      const patience = this.#publishing.connected ? this.settings.requestsTimeout : 0;
      await this.close(patience).catch((error) => this.#report(asError(error)));
      this.#tenants.delete(name);
      return;
    }
    this.#tenants.delete(name);
    for (const key of [tenant.key, ...tenant.keys()]) void this.follow(key);
    await this.#announce();
  }

  /** The namespaces that are open here. */
  get namespaces(): string[] {
    return this.closing ? [] : [...this.#tenants.keys()];
  }

  /** Waits up to `ms` for the broker to confirm what was sent; rejects if it has not. Leaves nothing on the broker. */
  close(ms: number): Promise<void> {
    return (this.closing ??= this.#close(ms));
  }

  async #close(ms: number): Promise<void> {
    for (const timer of [this.#heartbeat, this.#probing, this.#asking, this.#renewal]) clearInterval(timer);
    for (const request of [...this.#requests.values()]) request.end(request.missing.size);
    try {
      const start = performance.now();
      await within(ms, Promise.all(this.#replays)); // what a peer has missed goes with this server
      await this.outbox.close(Math.max(0, ms - (performance.now() - start)));
    } finally {
      await within(UNBIND_PATIENCE, this.#topology?.close() ?? Promise.resolve());
      await this.#consuming.close();
      await this.#publishing.close();
      this.opened.reject(new Error("Closed before it was ready"));
    }
  }

  #report(error: Error): void {
    this.#lastError = error;
    debug("[%s] %s", this.uid, error.message);
    const { onError } = this;
    if (onError) queueMicrotask(() => onError(error)); // what it throws is the user's
    for (const tenant of this.#tenants.values()) tenant.report(error);
  }

  // What the queue delivers.

  /** Everything that the consuming connection needs, at the start and after each loss. */
  async #consume(model: AmqpConnection, lose: Lose): Promise<void> {
    this.#opening ??= Promise.withResolvers<void>();
    // A new name each time: after a half-open link the broker may still hold the old queue.
    const queue = this.names.queue(this.uid, ++this.#generation);
    if (!Number.isNaN(this.#heard)) {
      this.#back = Infinity;
      for (const peer of this.#peers.values()) this.#miss(peer);
    }
    const { queueArguments, roomExchanges } = this.settings;
    const bindings = new Bindings(this.#tenants, mayHaveRoomExchanges(model, roomExchanges));
    const topology = new Topology(model, lose, this.names, queue, bindings);
    const before = this.names.queue(this.uid, this.#generation - 1);
    await topology.open(before, [ALL_SERVERS, serverKey(this.uid)], queueArguments, (message) => {
      if (message) this.#receive(message);
      else lose(new Error(`The queue ${queue} was deleted`));
    });
    this.#topology = topology;
    this.#opening?.resolve();
    this.#opening = undefined;
    this.#heard = performance.now();
    if (this.#back === undefined) return;
    this.#back = this.#heard;
    this.#renew();
  }

  #receive({ content, fields, properties }: ConsumeMessage): void {
    this.#heard = performance.now();
    try {
      const { maxPayload } = this.settings;
      if (content.length > maxPayload && content[1] !== Kind.Control)
        throw new FrameError(`a message of ${content.length} bytes; maxPayload is ${maxPayload} bytes`);
      if (/^application\/json\b/.test(properties.contentType ?? ""))
        this.#onForeign(content, fields, properties.headers?.["CC"]);
      else this.#onFrame(readFrame(content));
    } catch (error) {
      this.#reportUnreadable(asError(error), `exchange ${fields.exchange}, routing key ${fields.routingKey}`);
    }
  }

  #reportUnreadable(error: Error, source: string): void {
    if (error instanceof UnknownVersion) {
      if (this.#reportedVersions.has(error.sender) || this.#reportedVersions.size >= MAX_PEERS) return;
      this.#reportedVersions.add(error.sender);
    }
    const what = error instanceof FrameError ? "Dropped" : "Failed to handle a message:";
    this.#report(new Error(`${what} ${error.message} (${source})`, { cause: error }));
  }

  /** An event from any AMQP client: the routing keys, or the room's exchange, name the rooms. */
  #onForeign(content: Buffer, { exchange, routingKey }: ConsumeMessage["fields"], cc: unknown): void {
    const data = parseJson(content.toString(), NAMED_ARRAY);
    if (!Array.isArray(data)) throw new FrameError("application/json that is no array");
    const isRoomExchange = exchange !== this.names.main && exchange !== this.names.keys;
    const keys = isRoomExchange
      ? this.#topology?.bindings.viaExchange().filter((key) => this.names.roomExchange(key) === exchange)
      : [routingKey, ...(Array.isArray(cc) ? cc.map(String) : [])];
    for (const tenant of this.#tenants.values()) {
      const rooms = keys?.includes(tenant.key) ? [] : keys?.flatMap((key) => tenant.roomsUnder(key));
      if (keys?.includes(tenant.key) || rooms?.length)
        tenant.onMessage({ type: "packet", opts: { rooms: rooms ?? [], except: [], flags: {} }, data }, "");
    }
  }

  #onFrame(frame: Frame): void {
    if (frame.sender === this.uid) return;
    const peer = this.#peer(frame.sender);
    peer.seen = this.#heard;
    if (frame.kind === Kind.Control) return this.#onControl(peer, frame);
    this.#hold(peer, frame);
  }

  /** Takes a frame, or keeps it while something before it may be missing. */
  #hold(peer: Peer, frame: Frame): void {
    if (!peer.gap) {
      const missing = this.#missingBefore(peer, frame);
      if (missing === undefined) return this.#take(peer, frame);
      this.#miss(peer, missing, frame.number);
    }
    const { gap } = peer;
    if (!gap) return this.#take(peer, frame);
    gap.heldSince ??= this.#heard;
    gap.overflowed ||= gap.heldBytes + frame.body.length > this.settings.journal.bytes;
    if (gap.overflowed) return; // the peer still has it, and is asked again
    gap.held.push(frame);
    gap.heldBytes += frame.body.length;
  }

  /**
   * The lowest number that this frame names as a predecessor, which should have come to this queue and has not. Where nodes
   * of a RabbitMQ cluster lose touch, one publisher's messages may come in another order, or not at all.
   */
  #missingBefore({ recent, sure, greeted }: Peer, frame: Frame): number | undefined {
    if (greeted === -Infinity) return undefined; // nobody to ask
    let missing: number | undefined;
    const { body } = frame;
    const end = headStartOf(body);
    for (let offset = HEADER + body.readUInt32BE(24) * 4; offset < end; offset += 8) {
      const number = frame.number - body.readUInt32BE(offset);
      if (number <= sure || recent.has(number)) continue;
      const since = this.#topology?.bindings.since.get(body.readUInt32BE(offset + 4));
      if (since === undefined) continue;
      // Only if something older has come since the queue was bound: else it may have been sent before that.
      if (recent.tookBelow(number, since)) missing = number; // the nearest stands first
    }
    return missing === undefined || recent.isOld(frame.number) ? undefined : missing;
  }

  /** Takes a frame, unless it has come before. */
  #take(peer: Peer, frame: Frame, again = false): void {
    if (!peer.recent.add(frame, this.#heard)) return void this.#counts.duplicates++;
    if (again) this.#counts.replayed++;
    if (Number.isNaN(peer.sure)) peer.sure = frame.number;
    this.#counts.framesReceived++;
    this.#counts.packetsReceived += frame.packets;
    if (frame.kind === Kind.Packets) {
      const head = packetsHead(frame.head);
      this.#tenants.get(head.nsp)?.onPackets(head, frame);
      return;
    }
    const tenant = this.#tenants.get(frame.head);
    for (const parts of tenant ? packetsOf(frame) : []) {
      try {
        tenant?.onMessage(asMessage(decodeValue(parts)), frame.sender);
      } catch (error) {
        this.#reportUnreadable(asError(error), `peer ${peer.uid}`); // the next one has done nothing wrong
      }
    }
  }

  // Peers: who is there, and with which namespaces.

  /** The servers that have a namespace open, this one not counted. */
  peersOf(nsp: string): string[] {
    const uids: string[] = [];
    for (const peer of this.#peers.values()) if (peer.namespaces?.has(nsp)) uids.push(peer.uid);
    return uids;
  }

  #peer(uid: string): Peer {
    let peer = this.#peers.get(uid);
    if (!peer) {
      if (this.#peers.size >= MAX_PEERS) this.#forgetSome();
      peer = {
        uid,
        recent: new Recent(),
        sure: NaN,
        position: NaN,
        seen: this.#heard,
        greeted: -Infinity,
        revision: -1,
      };
      this.#peers.set(uid, peer);
      if (this.#back !== undefined) this.#miss(peer); // it may have come during the outage
    }
    return peer;
  }

  /** Forgets a tenth: strangers first, then who has been silent the longest. */
  #forgetSome(): void {
    const isKnown = ({ greeted }: Peer) => Number(greeted > -Infinity);
    const ranked = [...this.#peers.values()].toSorted((a, b) => isKnown(a) - isKnown(b) || a.seen - b.seen);
    for (const peer of ranked.slice(0, MAX_PEERS / 10)) this.#forget(peer);
  }

  #forget(peer: Peer): void {
    this.#peers.delete(peer.uid);
    this.#gapped.delete(peer);
    this.#replaying.delete(peer.uid);
  }

  /** Tells everyone who is here with what. One telling at a time: what changes meanwhile goes with the next. */
  #announce(): Promise<void> {
    this.#unannounced = true;
    this.#revision++;
    return (this.#announcement ??= this.#tellAll());
  }

  async #tellAll(): Promise<void> {
    await null; // so that `#announcement` is set before it is unset
    try {
      while (this.#unannounced && this.#consuming.connected && this.outbox.connected && !this.closing) {
        this.#unannounced = false;
        const bound = this.#bound();
        if (!(await this.outbox.control(ALL_SERVERS, this.#hello(this.#greeting)))) return; // the next connection announces
        this.#greeting = false;
        for (const { opened } of [...bound, this]) opened.resolve();
        if (this.#unannounced) await Bun.sleep(ANNOUNCE_INTERVAL);
      }
    } finally {
      this.#announcement = undefined;
    }
  }

  #bound(): Tenant[] {
    return [...this.#tenants.values()].filter(({ key }) => this.#topology?.bindings.isLive(key));
  }

  #hello(reply: boolean): Control {
    const namespaces = this.#bound().map(({ nsp }) => nsp.name);
    return { type: "hello", namespaces, revision: this.#revision, reply, position: this.outbox.position };
  }

  #tell(uid: string, control: Control, attachment?: Buffer): Promise<boolean> {
    return this.outbox.control(serverKey(uid), control, attachment);
  }

  #beat(): void {
    const now = performance.now();
    const { heartbeatTimeout, journal } = this.settings;
    this.outbox.evict();
    if (this.#back !== undefined && now - this.#back > journal.ms) this.#back = undefined;
    for (const peer of this.#peers.values()) {
      const silence = this.#silence(peer);
      if (peer.namespaces && silence > heartbeatTimeout) this.#gone(peer);
      // Kept longer than its journal lasts, for it may come back and send again what has been seen.
      if (silence <= heartbeatTimeout + journal.ms * (1 + PAGE_SHARE)) continue;
      this.#resume(peer, "is gone without saying what it had sent");
      this.#forget(peer);
    }
    const position = this.outbox.position;
    if (position !== undefined)
      void this.outbox.control(ALL_SERVERS, { type: "beat", revision: this.#revision, position });
  }

  /** For how many ms a peer was not heard, by what the queue delivers, which brings this server's own heartbeats too. */
  #silence(peer: Peer): number {
    return this.#heard - Math.max(peer.seen, this.#back ?? 0);
  }

  #onControl(peer: Peer, frame: Frame): void {
    const [json, attachment] = packetsOf(frame)[0] ?? [];
    const control = asControl(parseJson(json, OBJECT));
    switch (control.type) {
      case "hello":
        if (peer.gap && peer.gap.came === undefined) peer.gap.askAt = 0; // its queue is back
        peer.namespaces = new Set(control.namespaces);
        peer.revision = control.revision;
        peer.greeted = this.#heard;
        if (Number.isNaN(peer.sure) && !peer.gap) peer.sure = control.position ?? NaN; // all before was for others
        if (control.reply) void this.#tell(peer.uid, this.#hello(false));
        return this.#ask();
      case "beat":
        if (!peer.namespaces || peer.revision !== control.revision) void this.#tell(peer.uid, this.#hello(true));
        if (peer.gap) return;
        // It comes behind the frames that it covers. A lower one says that `sure` is forged; too low does no harm.
        if (control.position < peer.sure) peer.sure = control.position;
        else if (control.position >= peer.position) peer.sure = Math.max(peer.sure || 0, peer.position);
        peer.position = control.position;
        return;
      case "bye":
        return this.#gone(peer);
      case "ping":
        return;
      case "missing":
        if (this.#peers.get(control.uid)?.namespaces) void this.#tell(control.uid, { type: "ping" });
        return;
      case "ask": {
        const replay = this.#replay(peer.uid, control).finally(() => this.#replays.delete(replay));
        return void this.#replays.add(replay);
      }
    }
    const { gap } = peer;
    if (gap?.id !== control.id) return; // the answer to an earlier question
    gap.heldSince &&= this.#heard;
    gap.askAt = performance.now() + ASK_AGAIN;
    switch (control.type) {
      case "begin": {
        // What the journal no longer holds may have come here meanwhile.
        const early = this.#release(peer, gap, control.from);
        const lost = control.lost - early.filter(({ number }) => number >= control.from - control.lost).length;
        gap.came = 0;
        gap.from = Math.min(gap.from, control.from); // an answer to the question put again goes on where the first ended
        gap.to = Math.max(control.to, control.from - 1);
        peer.sure = control.from - 1;
        if (lost > 0) this.#lost(peer, lost);
        for (const frame of early) this.#handled(peer, () => this.#take(peer, frame));
        return;
      }
      case "again":
        if (gap.came !== control.index || !(attachment instanceof Buffer)) return; // asked for again
        gap.came++;
        return this.#takeAgain(peer, readFrame(attachment));
      case "end":
        if (gap.came !== control.count) return;
        peer.sure = gap.to;
        this.#resume(peer);
        if (gap.overflowed) this.#miss(peer);
    }
  }

  /** Its queue is gone: nobody waits for it, until it says hello. */
  #unreachable(uid: string): void {
    this.#replaying.delete(uid);
    const peer = this.#peers.get(uid);
    if (peer?.gap) peer.gap.askAt = performance.now() + this.settings.heartbeatInterval; // or when it says hello
    if (!peer?.namespaces) return;
    // Right after an outage its queue may just not be back yet.
    const upSince = Math.max(this.#consuming.upSince ?? Infinity, this.#publishing.upSince ?? Infinity);
    if (peer.greeted < upSince && performance.now() - upSince < 2 * BACKOFF.limit) return;
    this.#gone(peer);
    void this.outbox.control(ALL_SERVERS, { type: "missing", uid });
  }

  /** A queue has gone, and with it perhaps an exchange. */
  #renew(): void {
    this.#renewAgain = this.#renewal !== undefined;
    if (this.closing || this.#renewal) return;
    this.#renewal = setTimeout(() => {
      this.#renewal = undefined;
      void this.#topology?.renew();
      if (this.#renewAgain) this.#renew();
    }, RENEW_AFTER);
  }

  #gone(peer: Peer): void {
    if (peer.namespaces?.size) this.#renew();
    peer.namespaces = undefined;
    for (const request of [...this.#requests.values()]) this.#finish(request, peer.uid);
  }

  // Requests: a question to peers, and who has not answered yet.

  /** Resolves when each of `peers` has said all or is gone, or after `ms`, with the number of those that are missing. */
  request(
    peers: string[],
    ms: number,
    send: (id: number) => void,
    { take, done }: Pick<Request, "take" | "done">,
  ): Promise<number> {
    if (peers.length === 0 || this.closing) return Promise.resolve(peers.length);
    const id = ++this.#ids;
    send(id); // throws if it cannot be encoded, and then there is no request
    const { promise, resolve } = Promise.withResolvers<number>();
    const end = (missing: number) => {
      clearTimeout(timer);
      this.#requests.delete(id);
      resolve(missing);
    };
    const request: Request = { missing: new Set(peers), take, done, end };
    const timer = setTimeout(() => end(request.missing.size), ms);
    this.#requests.set(id, request);
    this.#probing ??= setInterval(() => this.#probe(), PROBE_INTERVAL);
    return promise;
  }

  onAnswer(message: Answer, from: string): void {
    const request = this.#requests.get(message.id);
    if (request?.missing.has(from) && request.take(message, from)) this.#finish(request, from);
  }

  #finish(request: Request, uid: string): void {
    if (!request.missing.delete(uid)) return;
    request.done?.(uid);
    if (request.missing.size === 0) request.end(0);
  }

  /** The broker returns what is sent to a queue that no longer exists. */
  #probe(): void {
    const owing = new Set([...this.#requests.values()].flatMap((request) => [...request.missing]));
    for (const uid of owing) void this.#tell(uid, { type: "ping" });
    if (this.#requests.size > 0) return;
    clearInterval(this.#probing);
    this.#probing = undefined;
  }

  // Gaps: after an outage each peer is asked for what it sent meanwhile; until it has answered, its newer frames wait.

  /** Something of this peer's may be missing: this frame, as another one says, or any. */
  #miss(peer: Peer, missing?: number, seen?: number): void {
    if (this.#tenants.size === 0) return; // an emitter takes no packets
    peer.gap = {
      missing,
      seen,
      from: Infinity,
      held: [],
      heldBytes: 0,
      overflowed: false,
      heldSince: undefined,
      ...peer.gap, // what an earlier question has gathered
      id: questionId(),
      came: undefined,
      to: 0,
      askAt: 0,
    };
    this.#gapped.add(peer);
    this.#ask([peer]);
  }

  /** Asks each of these peers, if it has a gap, again and again: its queue may not be back yet either. */
  #ask(peers: Iterable<Peer> = this.#gapped): void {
    if (!this.#consuming.connected || !this.outbox.connected || this.closing) return;
    const now = performance.now();
    const { heartbeatTimeout, journal } = this.settings;
    for (const peer of peers) {
      const { gap } = peer;
      if (!gap) continue;
      // It may be cut off itself, and its journal lasts a while; but a stranger may be nobody.
      const patience = peer.greeted === -Infinity ? heartbeatTimeout : Math.max(journal.ms, heartbeatTimeout);
      if (now - (gap.heldSince ?? now) > patience) {
        this.#resume(peer, "has not said what it had sent");
        continue;
      }
      if (now < gap.askAt) continue;
      gap.askAt = now + ASK_AGAIN;
      if (gap.came !== undefined) gap.id = questionId(); // what may still come of the first answer has a hole
      gap.came = undefined;
      const sure = Number.isNaN(peer.sure) ? undefined : peer.sure;
      void this.#tell(peer.uid, {
        type: "ask",
        id: gap.id,
        sure,
        taken: peer.recent.evidence(gap.missing ?? Infinity),
      });
    }
    if (this.#gapped.size > 0) this.#asking ??= setInterval(() => this.#ask(), ASK_AGAIN);
    else {
      clearInterval(this.#asking);
      this.#asking = undefined;
    }
  }

  /** Sends a peer what it has missed: straight to its queue, in order, a few frames at a time. */
  async #replay(uid: string, { id, taken, sure }: Control & { type: "ask" }): Promise<void> {
    const latest = this.#replaying.get(uid);
    // Asked again meanwhile; or the answer has been sent, and stands in the queue behind much else.
    if (latest?.id === id && performance.now() - latest.endedAt < this.settings.heartbeatTimeout) return;
    const replay = { id, endedAt: Infinity };
    this.#replaying.set(uid, replay);
    const { bodies, ...begin } = this.outbox.since(uid, taken, sure);
    let confirmed = this.#tell(uid, { type: "begin", id, ...begin });
    let count = 0;
    for (const body of bodies) {
      confirmed = this.#tell(uid, { type: "again", id, index: count }, body);
      if (count++ % REPLAY_WINDOW === 0 && !(await confirmed)) break;
      if (this.#replaying.get(uid) !== replay) return; // it has asked anew, or is gone
    }
    if ((await confirmed) && (await this.#tell(uid, { type: "end", id, count }))) replay.endedAt = performance.now();
    else if (this.#replaying.get(uid) === replay) this.#replaying.delete(uid);
  }

  #takeAgain(peer: Peer, frame: Frame): void {
    if (frame.sender !== peer.uid || frame.kind === Kind.Control)
      throw new FrameError("a replay of somebody else's frame");
    peer.sure = frame.number;
    this.#take(peer, frame, true);
  }

  /** The gap is closed, or given up: what waited comes next. */
  #resume(peer: Peer, failure?: string): void {
    const { gap } = peer;
    if (!gap) return;
    peer.gap = undefined;
    this.#gapped.delete(peer);
    if (failure && !Number.isNaN(peer.sure) && !this.closing)
      this.#report(new Error(`Peer ${peer.uid} ${failure}: frames after number ${peer.sure} may be lost`));
    for (const frame of this.#release(peer, gap, Infinity))
      this.#handled(peer, () => {
        if (failure || frame.number === gap.seen)
          this.#take(peer, frame); // about this one the peer was asked
        else this.#hold(peer, frame);
      });
  }

  /** What waits and is numbered below this, in order, without what has been sent again. */
  #release({ sure }: Peer, gap: Gap, below: number): Frame[] {
    const frames = gap.held.filter(({ number }) => number < below && !(number >= gap.from && number <= sure));
    const kept = gap.held.filter(({ number }) => number >= below);
    this.#counts.duplicates += gap.held.length - frames.length - kept.length;
    gap.held = kept;
    gap.heldBytes = kept.reduce((sum, { body }) => sum + body.length, 0);
    return frames.toSorted((one, other) => one.number - other.number);
  }

  /** A frame that cannot be read costs no other. */
  #handled(peer: Peer, handle: () => void): void {
    try {
      handle();
    } catch (error) {
      this.#reportUnreadable(asError(error), `peer ${peer.uid}`);
    }
  }

  #lost(peer: Peer, frames: number): void {
    this.#lostOfPeers += frames;
    this.#report(new Error(`Lost ${frames} frames of peer ${peer.uid}: its journal no longer held them`));
  }
}

// ── Connections ──────────────────────────────────────────────────────────────────────────────────────────────────────

interface LinkEvents {
  /** Everything that has to be done on a new connection, at the start and after each loss. */
  up(model: AmqpConnection, lose: Lose): Promise<void>;
  /** It has been done: the link is connected. */
  settled(): void;
  down(error: Error): void;
}
type Lose = (error: Error) => void;
type Timeout = ReturnType<typeof setTimeout>;

/** Delays between attempts, in ms: doubled up to the limit, with jitter. */
const BACKOFF = { first: 100, limit: 1_000, refused: 10_000 };
/** A connection that has lasted this long (ms) starts the back-off anew. */
const STABLE = 5_000;

/** Connections that a link has used: a function that returns one again is told so. */
const used = new WeakSet<AmqpConnection>();

/** Keeps one connection up until it is closed. */
class Link {
  /** Since when the connection is up (ms, monotonic); undefined while it is not. */
  upSince: number | undefined;
  /** How often it has come up. */
  connects = 0;
  #closed = false;
  #wake: (() => void) | undefined;
  #lose: Lose | undefined;
  #running: Promise<void> | undefined;

  constructor(
    readonly name: "consuming" | "publishing",
    readonly prefix: string,
    readonly connect: () => AmqpConnection | Promise<AmqpConnection>,
    readonly report: (error: Error) => void,
    readonly events: LinkEvents,
  ) {}

  get connected(): boolean {
    return this.upSince !== undefined;
  }

  start(): void {
    this.#running = this.#run();
  }

  async close(): Promise<void> {
    this.#closed = true;
    this.#wake?.();
    this.#lose?.(new Error("closed"));
    // Without #lose it is still connecting, which nobody can abort: what comes of it is closed then.
    if (this.#lose) await this.#running;
  }

  async #run(): Promise<void> {
    let reported: string | undefined;
    for (let attempt = 0; !this.#closed; attempt++) {
      const { promise: lost, resolve: lose } = Promise.withResolvers<Error>();
      let model: AmqpConnection | undefined;
      let error: Error;
      try {
        model = await this.#open();
        this.#lose = lose;
        if (this.#closed) lose(new Error("closed"));
        watch(model, lose);
        const failed = await Promise.race([this.events.up(model, lose), lost]);
        if (failed) throw failed;
        this.upSince = performance.now();
        this.connects++;
        reported = undefined;
        this.events.settled();
        error = await lost;
      } catch (reason) {
        error = asError(reason);
      }
      if (this.upSince !== undefined && performance.now() - this.upSince > STABLE) attempt = 0;
      this.upSince = undefined;
      this.events.down(error);
      if (model) await release(model);
      this.#lose = undefined;
      if (this.#closed) return;
      // Once per outage, unless there is news.
      if (kindOf(error) !== reported) this.report(explain(error, this.name, this.prefix));
      reported = kindOf(error);
      await this.#pause(backoff(attempt, error));
    }
  }

  /** A connection, or an error: one that does not answer at all is given up, and closed if it answers later. */
  async #open(): Promise<AmqpConnection> {
    let late = false;
    const opening = (async () => {
      const model = await this.connect();
      if (typeof model?.createConfirmChannel !== "function" || typeof model.close !== "function")
        throw new TypeError(`amqpConnection returned ${Bun.inspect(model)}, not what amqplib's connect() returns`);
      if (used.has(model))
        throw new TypeError(
          "amqpConnection returned a connection that is in use: return a new connection from each call",
        );
      used.add(model);
      if (late) {
        watch(model, (error) => debug("late: %s", error.message));
        await release(model);
      }
      return model;
    })();
    opening.catch(() => {}); // once it is late, nobody waits for it
    const stopped = new Promise<undefined>((resolve) => {
      this.#wake = () => {
        late = true;
        resolve(undefined);
      };
    });
    const model = await within(CONNECT_PATIENCE, Promise.race([opening, stopped]));
    late ||= !model;
    if (!model) throw new Error(`amqpConnection did not connect within ${CONNECT_PATIENCE} ms`);
    return model;
  }

  #pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

/** Hears of the connection's end. The listeners stay: amqplib throws an error that nobody listens for. */
function watch(model: AmqpConnection, lose: Lose): void {
  // Both kinds have these events, and their overloads of `on` do not unite.
  const emitter: NodeJS.EventEmitter = model;
  emitter.on("error", lose).on("close", (error?: Error) => lose(error ?? new Error("Connection closed")));
  emitter.on("disconnect", lose); // amqplib's recovering connection: replaced, not waited for
  // amqplib leaves its socket out of its types. It also leaves Nagle's algorithm on, which holds a small message back for
  // up to 40 ms while another is under way, and does not look at the socket's own "close".
  const stream = (model as { connection?: { stream?: Partial<TcpSocket> } }).connection?.stream;
  stream?.setNoDelay?.(true);
  stream?.once?.("close", () => queueMicrotask(() => lose(new Error("Socket closed"))));
}

/** How long a closing server unbinds its rooms' exchanges, in ms, before it lets them go with its queue. */
const UNBIND_PATIENCE = 5_000;
/** How long amqpConnection may take, in ms. */
const CONNECT_PATIENCE = 10_000;
/** How long an answer to a goodbye is waited for, in ms: a dead link gives none. */
const CLOSE_PATIENCE = 1_000;

/** What a promise resolves to, or undefined after `ms`. */
async function within<T>(ms: number, promise: Promise<T>): Promise<T | undefined> {
  let timer: Timeout | undefined;
  const late = new Promise<undefined>((resolve) => (timer = setTimeout(() => resolve(undefined), ms)));
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Closes what `amqpConnection` returned. */
async function release(model: AmqpConnection): Promise<void> {
  await within(
    CLOSE_PATIENCE,
    model.close().catch((error) => debug("close: %s", asError(error).message)),
  );
}

const isRefused = (error: Error): boolean => error instanceof Refusal || /ACCESS.REFUSED/.test(error.message);

function backoff(attempt: number, error: Error): number {
  const limit = isRefused(error) ? BACKOFF.refused : BACKOFF.limit;
  return Math.min(limit, BACKOFF.first * 2 ** attempt) * (0.5 + Math.random() / 2);
}

/** What amqplib adds to an error by which the broker closed a channel. */
type BrokerError = Error & { code?: number; classId?: number; methodId?: number };

/** Which permission an AMQP method needs, by class and method id (https://www.rabbitmq.com/docs/access-control). */
const PERMISSIONS: Record<string, string> = {
  "40,10": "configure",
  "40,20": "configure",
  "50,10": "configure",
  "40,30": "write and read",
  "40,40": "write and read",
  "60,20": "read",
  "60,40": "write",
};

/** Says what to do where the broker refuses. */
function explain(error: BrokerError, link: string, prefix: string): Error {
  const { message, classId, methodId } = error;
  // Newer brokers name the permission; a queue needs write to be bound, and the exchange read.
  const bound = classId === 50 && methodId !== 10 ? (/to queue/.test(message) ? "write" : "read") : undefined;
  const missing = /(configure|write|read) access/.exec(message)?.[1] ?? bound ?? PERMISSIONS[`${classId},${methodId}`];
  const pattern = `^${prefix.replace(/[^\w-]/g, "\\$&")}(#|$)`;
  const advice = isRefused(error) && missing ? `; grant the user ${missing} permission on ${pattern}` : "";
  return new Error(`The ${link} connection was lost: ${message}${advice}`, { cause: error });
}

/** The same for each attempt: without the name of the queue, which changes. */
const kindOf = (error: Error): string => error.message.replace(/'[^']*'/g, "");

/** A channel that goes down with its connection, and takes it down. */
function watched<C extends Channel>(channel: C, lose: Lose): C {
  channel.on("error", lose);
  // A connection closes its channels first, and then says why.
  channel.on("close", () => queueMicrotask(() => lose(new Error("Channel closed"))));
  return channel;
}

/** Closes a channel of a connection that stays. */
function discard(channel: Channel | undefined): void {
  channel?.close().catch((error) => debug("close: %s", asError(error).message)); // it has been closed
}

// ── Bindings: what is bound follows the rooms ────────────────────────────────────────────────────────────────────────

/** Whose rooms are bound: the adapter of a namespace. */
interface RoomOwner {
  /** The routing key of what is for everyone in the namespace. */
  readonly key: string;
  /** The routing keys that its rooms travel under. */
  keys(): Iterable<string>;
  /** Its rooms that travel under this key. */
  roomsUnder(key: string): Room[];
}

/** How a queue gets what is published under a routing key: by a binding, or through an exchange of the room's own. */
type Way = "key" | "exchange";

/** Something to do on the broker. */
interface BindingChange {
  readonly key: string;
  readonly from: Way | undefined;
  readonly to: Way | undefined;
}

/**
 * A server with more rooms than this gives none an exchange. When a queue goes, RabbitMQ deletes its auto-delete exchanges in
 * one transaction, in a time that grows with their number and with that of all bindings; publishers wait meanwhile. Measured
 * with 3.10: 250 rooms take 1 s, 2,000 take 168 s, 100 rooms of 10,000 take 9 s; 10,000 rooms without exchanges take 0.7 s.
 */
const MAX_ROOM_EXCHANGES = 100;

/** The routing keys of one queue: those that the rooms want, those that the broker has, and what to do next. No I/O. */
class Bindings {
  /** Bound keys. One that is being unbound is none of them. */
  readonly bound = new Map<string, Way>();
  /** Since when the queue gets what is published under a key (ms, monotonic), by the key's digest. */
  readonly since = new Map<number, number>();
  /** Whether the queue gets everything. */
  takesAll = false;
  /** Whether rooms get exchanges of their own. */
  #mayHaveExchanges: boolean;
  /** Keys to look at, the most urgent first: namespaces, joins, leaves. */
  readonly #queues = [new Set<string>(), new Set<string>(), new Set<string>()] as const;
  /** Keys that are being bound (true) or unbound. */
  readonly #busy = new Map<string, boolean>();
  /** Joins that wait until their key is live. */
  readonly #waiting = new Map<string, PromiseWithResolvers<void>>();

  constructor(
    /** By the name of their namespace. */
    readonly owners: ReadonlyMap<string, RoomOwner>,
    mayHaveExchanges: boolean,
  ) {
    this.#mayHaveExchanges = mayHaveExchanges;
  }

  /** How many bindings are still to be made. */
  get missing(): number {
    let count = this.#queues[0].size + this.#queues[1].size;
    for (const binds of this.#busy.values()) count += Number(binds);
    return count;
  }

  /** Whether the queue gets what is published under this key, and what is for everyone in its namespace. */
  isLive(key: string): boolean {
    return this.takesAll || (this.bound.has(key) && this.bound.has(this.#ownerOf(key)?.key ?? key));
  }

  /** A key may have to be bound or unbound. The promise resolves when one that is wanted is live. */
  look(key: string): Promise<void> | undefined {
    const wanted = this.#wants(key);
    if (wanted !== this.bound.get(key) && !this.#busy.has(key)) this.#enqueue(key, wanted);
    if (!wanted || this.isLive(key)) return undefined;
    const waiting = this.#waiting.get(key) ?? Promise.withResolvers<void>();
    this.#waiting.set(key, waiting);
    return waiting.promise;
  }

  lookAtAll(): void {
    for (const owner of this.owners.values()) for (const key of [owner.key, ...owner.keys()]) void this.look(key);
    for (const key of this.bound.keys()) void this.look(key);
  }

  /** What to do next, if anything. `done()` follows. */
  next(): BindingChange | undefined {
    if (this.#mayHaveExchanges && this.bound.size + this.missing > MAX_ROOM_EXCHANGES) {
      this.#mayHaveExchanges = false;
      for (const key of this.bound.keys()) void this.look(key);
    }
    for (const queue of this.#queues) {
      for (const key of queue) {
        queue.delete(key);
        const [from, to] = [this.bound.get(key), this.#wants(key)];
        if (from === to || this.#busy.has(key)) continue;
        if (!to) this.bound.delete(key);
        this.#busy.set(key, to !== undefined);
        return { key, from, to };
      }
    }
    return undefined;
  }

  /** The same for a key that is bound, through an exchange that may have gone meanwhile. */
  again(key: string): BindingChange | undefined {
    if (this.#busy.has(key) || this.bound.get(key) !== "exchange") return undefined;
    this.#busy.set(key, true);
    return { key, from: undefined, to: "exchange" };
  }

  done({ key, to }: BindingChange): void {
    this.#busy.delete(key);
    if (to) {
      this.bound.set(key, to);
      this.since.set(digestOf(key), performance.now());
    } else this.since.delete(digestOf(key));
    void this.look(key);
    const isRoom = this.#ownerOf(key)?.key !== key;
    this.resolve(isRoom ? [key] : this.#waiting.keys());
  }

  /** Lets those of the joins go on that wait for nothing more. */
  resolve(keys: Iterable<string> = this.#waiting.keys()): void {
    for (const key of keys) {
      if (this.#wants(key) && !this.isLive(key)) continue;
      this.#waiting.get(key)?.resolve();
      this.#waiting.delete(key);
    }
  }

  /** Bound keys that lead through an exchange of their own. */
  viaExchange(): string[] {
    return [...this.bound].flatMap(([key, way]) => (way === "exchange" ? [key] : []));
  }

  /** The queue has gone: nobody waits for it. */
  end(): void {
    for (const { resolve } of this.#waiting.values()) resolve();
    this.#waiting.clear();
    for (const queue of this.#queues) queue.clear();
  }

  #enqueue(key: string, wanted: Way | undefined): void {
    const [namespaces, joins, leaves] = this.#queues;
    if (!wanted) leaves.add(key);
    else if (this.#ownerOf(key)?.key === key) namespaces.add(key);
    else joins.add(key);
  }

  #wants(key: string): Way | undefined {
    const owner = this.#ownerOf(key);
    if (owner?.key === key) return "key";
    if (!owner || owner.roomsUnder(key).length === 0) return undefined;
    return this.#mayHaveExchanges ? "exchange" : "key";
  }

  #ownerOf(key: string): RoomOwner | undefined {
    if (!key.startsWith(HASHED)) return this.owners.get(namespaceOf(key));
    return this.owners.values().find((owner) => owner.key === key || owner.roomsUnder(key).length > 0);
  }
}

/** What the broker's version forbids. */
class Refusal extends Error {}

/** From this version on, an auto-delete exchange that is unbound while somebody else binds it destroys the broker's metadata. */
const KHEPRI_ONLY = "4.2.0";

/** @throws Refusal if room exchanges are asked for where they would destroy the broker */
function mayHaveRoomExchanges(model: AmqpConnection, wanted: boolean | undefined): boolean {
  const version = brokerVersion(model);
  const safe = Bun.semver.order(version, KHEPRI_ONLY) < 0;
  if (wanted && !safe)
    throw new Refusal(
      `roomExchanges: true was refused: the broker's version is ${version}, and from RabbitMQ 4.2 on exchanges that come and go ` +
        "with their bindings destroy its metadata store; leave roomExchanges out, and bind to the routing keys of rooms instead",
    );
  return wanted ?? safe;
}

/** amqplib leaves the properties out of the type of its recovering connection. */
function brokerVersion(model: AmqpConnection): string {
  const { connection } = model as { connection?: { serverProperties?: { version?: unknown } } };
  const version = /^\d+\.\d+(\.\d+)?/.exec(String(connection?.serverProperties?.version))?.[0] ?? "0.0.0";
  return version.split(".").length === 2 ? `${version}.0` : version;
}

/** amqplib keeps one operation in flight on each channel, so more of them bind faster. */
const LANES = 4;
/** With more bindings to make than this, the queue takes everything until they are made. */
const STORM = 32;
/** How long the removal of this server's last queue is waited for, in ms. */
const REMOVAL_PATIENCE = 10_000;
/** How often an operation is tried that meets an exchange which another server's last leave has just deleted. */
const ATTEMPTS = 20;

const DURABLE: Options.AssertExchange = { durable: true };
const TRANSIENT: Options.AssertExchange = { durable: false, autoDelete: true };

/** The two exchanges that stay. */
async function declare(channel: Channel, { main, keys }: Names): Promise<void> {
  await channel.assertExchange(main, "fanout", DURABLE);
  await channel.assertExchange(keys, "direct", DURABLE);
  await channel.bindExchange(keys, main, "");
}

/** One queue on one connection, and the loop that binds and unbinds until what is bound is what is wanted. */
class Topology {
  #channel: Channel | undefined;
  /** Channels of their own, so that a refused operation closes no other: those that have nothing to do. */
  readonly #idle: Channel[] = [];
  /** Whether the queue is about to take everything, or to take it no longer. */
  #switching = false;
  #ended = false;

  constructor(
    readonly model: AmqpConnection,
    readonly lose: Lose,
    readonly names: Names,
    readonly queue: string,
    readonly bindings: Bindings,
  ) {}

  /**
   * Makes the queue, which takes everything from here on; `own` are the server's keys. Rooms are bound once the queue `before`
   * is gone, for RabbitMQ begins its removal again and again while others bind: measured with 3.10 and 10,000 bindings, it
   * takes 0.7 s alone and did not end while four channels bound.
   */
  async open(
    before: string,
    own: string[],
    queueArguments: object,
    receive: (message: ConsumeMessage | null) => void,
  ): Promise<void> {
    const { model, lose, names, queue, bindings } = this;
    const lanes = await Promise.all(Array.from({ length: LANES }, () => openLane(model)));
    const channel = (this.#channel = watched(await model.createChannel(), lose));
    const exclusive = { exclusive: true, durable: false, arguments: queueArguments };
    await Promise.all([declare(lanes[0] ?? channel, names), channel.assertQueue(queue, exclusive)]);
    await Promise.all([
      ...own.map((key, i) => (lanes[i] ?? channel).bindQueue(queue, names.keys, key)),
      channel.bindQueue(queue, names.main, ""),
    ]);
    for (const key of own) bindings.since.set(digestOf(key), performance.now());
    bindings.takesAll = true;
    await channel.consume(queue, (message) => this.#ended || receive(message), { noAck: true });
    removed(model, before).then(() => {
      this.#idle.push(...lanes);
      this.followAll();
    }, lose);
  }

  /** The queue is given up: what it still delivers would come out of order. */
  end(): void {
    this.#ended = true;
    this.bindings.end();
  }

  follow(key: string): Promise<void> | undefined {
    const live = this.bindings.look(key);
    this.#work();
    return live;
  }

  followAll(): void {
    this.bindings.lookAtAll();
    this.#work();
  }

  /** Binds the rooms' exchanges once more after a queue has gone: the broker may delete one with it just as it is bound. */
  async renew(): Promise<void> {
    try {
      let lane = await openLane(this.model);
      for (const key of this.bindings.viaExchange()) {
        const change = this.bindings.again(key);
        if (!change || this.#ended) continue;
        lane = await this.#change(lane, change);
        this.bindings.done(change);
      }
      await lane.close();
      this.#work();
    } catch (error) {
      this.lose(asError(error));
    }
  }

  /**
   * Unbinds the rooms' exchanges one by one before the queue goes: what goes with it goes in one transaction, for which the
   * broker's other users wait.
   */
  async close(): Promise<void> {
    this.bindings.end();
    while (this.#idle.length < LANES && !this.#ended) await Bun.sleep(5); // what is just being done
    const keys = this.bindings.viaExchange();
    await Promise.all(
      this.#idle.map(async (lane, i) => {
        for (const [n, key] of keys.entries())
          if (n % LANES === i) lane = await this.#change(lane, { key, from: "exchange", to: undefined });
      }),
    );
  }

  #work(): void {
    this.#switch();
    while (this.#idle.length > 0 && !this.#ended) {
      const change = this.bindings.next();
      const lane = change && this.#idle.pop();
      if (!lane) return;
      void this.#changeAll(lane, change);
    }
  }

  async #changeAll(lane: Channel, first: BindingChange): Promise<void> {
    try {
      for (let change: BindingChange | undefined = first; change && !this.#ended; change = this.bindings.next()) {
        lane = await this.#change(lane, change);
        this.bindings.done(change);
      }
      this.#idle.push(lane);
      this.#work();
    } catch (error) {
      this.lose(asError(error));
    }
  }

  /** Lets the queue take everything while there is much to bind, for then joins need not wait. */
  #switch(): void {
    const { bindings, queue } = this;
    const takesAll = bindings.missing > (bindings.takesAll ? 0 : STORM);
    if (takesAll === bindings.takesAll || this.#switching || this.#ended) return;
    this.#switching = true;
    const channel = this.#channel;
    if (!takesAll) bindings.takesAll = false;
    const switched = takesAll
      ? channel?.bindQueue(queue, this.names.main, "")
      : channel?.unbindQueue(queue, this.names.main, "");
    switched?.then(() => {
      this.#switching = false;
      bindings.takesAll = takesAll;
      bindings.resolve();
      this.#switch();
    }, this.lose);
  }

  /** Returns the channel to go on with: where an exchange has vanished between two steps (404), a new one, after trying again. */
  async #change(lane: Channel, change: BindingChange): Promise<Channel> {
    for (let attempt = 1; ; attempt++) {
      try {
        await this.#tryChange(lane, change);
        return lane;
      } catch (error) {
        const { code, name } = error as BrokerError;
        const isGone = code === 404 || name === "IllegalOperationError";
        if (this.#ended || !isGone || attempt === ATTEMPTS) {
          if (change.to === "exchange") await this.#deleteUnused(this.names.roomExchange(change.key));
          throw error;
        }
        lane = await openLane(this.model);
      }
    }
  }

  async #tryChange(lane: Channel, { key, from, to }: BindingChange): Promise<void> {
    const { queue, names } = this;
    const exchange = names.roomExchange(key);
    if (to === "exchange") {
      await lane.assertExchange(exchange, "fanout", TRANSIENT);
      await lane.bindQueue(queue, exchange, ""); // first the queue, which keeps the exchange alive
      await lane.bindExchange(exchange, names.keys, key);
    } else if (to === "key") await lane.bindQueue(queue, names.keys, key);
    // The queue gets one copy, whatever the ways. The last one to unbind deletes the room's exchange.
    if (from === "exchange") await lane.unbindQueue(queue, exchange, "");
    else if (from === "key") await lane.unbindQueue(queue, names.keys, key);
  }

  /** The broker deletes no auto-delete exchange that was never bound. */
  async #deleteUnused(exchange: string): Promise<void> {
    try {
      const lane = await openLane(this.model);
      await lane.deleteExchange(exchange, { ifUnused: true });
      await lane.close();
    } catch (error) {
      debug("delete: %s", asError(error).message); // somebody has bound it, or the connection is gone
    }
  }
}

/** Waits, within bounds, until the broker has removed a queue. */
async function removed(model: AmqpConnection, queue: string): Promise<void> {
  for (const until = performance.now() + REMOVAL_PATIENCE; performance.now() < until; await Bun.sleep(50)) {
    const lane = await openLane(model);
    try {
      await lane.checkQueue(queue);
      await lane.close();
    } catch (error) {
      const { code } = error as BrokerError; // either closes the channel
      if (code === 404) return;
      if (code !== 405) throw error; // 405: somebody's exclusive queue, still
    }
  }
}

async function openLane(model: AmqpConnection): Promise<Channel> {
  const channel = await model.createChannel();
  channel.on("error", (error) => debug("topology: %s", error.message)); // reported by the operation that fails
  return channel;
}

// ── Outbox: frames on their way to the broker, and the journal of those that were sent ───────────────────────────────

/** Where the packets of a frame go. */
interface Destination {
  readonly kind: Kind;
  readonly exchange: string;
  readonly key: string;
  readonly options: Options.Publish;
  /** Tells the receiver what the packets are for. */
  readonly head: string;
  readonly volatile: boolean;
  /** Of the exchange with each of the keys: made for the first frame. */
  digests?: number[];
}

/** A frame that still takes packets. */
interface Draft extends Content {
  readonly to: Destination;
  /** When it was begun (ms, monotonic). */
  readonly at: number;
  size: number;
}

/** A frame that is under way, or waits. */
interface Entry {
  readonly to: Destination;
  readonly number: number;
  /** In a page of the journal: amqplib copies what it sends. */
  readonly body: Buffer;
  readonly packets: number;
  confirmed: boolean;
}

/** A piece of the journal: frames one behind the other, their numbers too. */
interface Page {
  content: Buffer;
  packed: boolean;
  /** The number of its first frame. */
  readonly first: number;
  /** Where each frame ends. */
  readonly ends: number[];
  /** For each frame the key of the one server that may have it again; undefined for all servers. */
  readonly readers: (string | undefined)[];
  /** When its first and its last frame were begun (ms, monotonic). */
  readonly since: number;
  until: number;
}

/** The answer to a peer's question what it has missed. */
interface Missed {
  /** The first number that the answer covers. */
  from: number;
  /** How many before it the journal no longer holds, without those that this server counts as dropped. */
  lost: number;
  /** The last number that was sent. */
  to: number;
  bodies: Iterable<Buffer>;
}

interface OutboxEvents {
  report(error: Error): void;
  /** A message to one queue came back: there is no such queue. */
  unreachable(uid: string): void;
  /** The broker takes messages again. */
  ready(): void;
}

/** While a frame is unconfirmed, one that may still grow waits until this many ms after it. */
const SPACING = 1;
/** And while so many are, until one of them is confirmed, or this many ms after the last one. */
const WINDOW = 8;
const STALLED_SPACING = 10;
/** amqplib's word for a message that the broker did not take. */
const NACKED = "message nacked";
/** How many bytes of complete frames may be unconfirmed before the next one waits. */
const IN_FLIGHT = 256 * 1024;
/** A frame takes packets up to about this size, in bytes. */
const FRAME_SIZE = 32 * 1024;
/** What the header and a replay add to a packet, at most (bytes). */
const OVERHEAD = 768;
/** What a frame that is not confirmed yet costs beyond its bytes, roughly: counted with them. */
const ENTRY_OVERHEAD = 256;
/** The bytes of a page of the journal, if no larger frame needs more. */
const PAGE = 128 * 1024;
/** A page has at most this part of the bytes that the journal may hold, and of the time for which it keeps them. */
const PAGE_SHARE = 1 / 16;
/** The reader of a frame that nobody may have again. */
const NOBODY = "";
/** How many runs of dropped frames are remembered, so that no peer counts them too. */
const MAX_RUNS = 1_000;
/** Dropped frames are reported together, this many ms after the first. */
const DROP_REPORT = 1_000;

const lastOf = ({ first, ends }: Page): number => first + ends.length - 1;
const bytesOf = ({ ends }: Page): number => ends.at(-1) ?? 0;

function* framesIn(pages: Page[], from: number, to: number, reader: string): Generator<Buffer> {
  for (const page of pages) {
    const { first, ends, readers } = page;
    const count = Math.min(ends.length, to - first + 1);
    let unpacked: Buffer | undefined;
    for (let i = Math.max(0, from - first); i < count; i++) {
      if ((readers[i] ?? reader) !== reader) continue;
      // It may be packed meanwhile, and its buffer used again.
      const frames = page.packed ? (unpacked ??= Bun.zstdDecompressSync(page.content)) : page.content;
      yield frames.subarray(ends[i - 1] ?? 0, ends[i]);
    }
  }
}

/**
 * The frames of the last `journal.ms`, in pages that are written one after the other and packed once they are confirmed. As
 * an object, or as a buffer of its own, each of some hundred thousand frames would cost the garbage collector and the kernel
 * more time than all else that is done with it; so would 16 MiB of unpacked pages, for the more lives, the more garbage
 * JavaScriptCore lets pile up.
 */
class Journal {
  /** Of all frames. */
  bytes = 0;
  /** The oldest first. */
  readonly pages: Page[] = [];
  readonly #pageSize: number;
  /** A frame that waits takes packets no longer than this (ms), nor does a page take frames. */
  readonly pageTime: number;
  /** The buffer of a page that was packed, for the next one. */
  #spare: Buffer | undefined;

  constructor({ bytes, ms }: Settings["journal"]) {
    this.#pageSize = Math.min(PAGE, Math.ceil(bytes * PAGE_SHARE));
    this.pageTime = ms * PAGE_SHARE;
  }

  /**
   * The first number that it holds; undefined if it is empty. Of what came later it lacks what was dropped unsent behind a
   * frame that is still under way.
   */
  get oldest(): number | undefined {
    return this.pages[0]?.first;
  }

  /** Room for the frame with the next number, which was begun `at`. */
  add(number: number, at: number, size: number, reader: string | undefined): Buffer {
    let page = this.pages.at(-1);
    let end = page ? bytesOf(page) : 0;
    const goesOn = page && lastOf(page) === number - 1 && at - page.since <= this.pageTime;
    if (!page || !goesOn || end + size > page.content.length) {
      const content = this.#buffer(size);
      page = { content, packed: false, first: number, ends: [], readers: [], since: at, until: at };
      this.pages.push(page);
      end = 0;
    }
    this.bytes += size;
    page.ends.push(end + size);
    page.readers.push(reader);
    page.until = at;
    return page.content.subarray(end, end + size);
  }

  #buffer(size: number): Buffer {
    const spare = this.#spare;
    if (!spare || size > spare.length) return Buffer.allocUnsafeSlow(Math.max(this.#pageSize, size));
    this.#spare = undefined;
    return spare;
  }

  drop(index: number): void {
    for (const page of this.pages.splice(index, 1)) this.bytes -= bytesOf(page);
  }

  /** Packs the pages whose frames have all been confirmed, up to this number; the newest page may take more. */
  pack(settled: number): void {
    for (let i = this.pages.length - 2; i >= 0; i--) {
      const page = this.pages[i]!;
      if (page.packed) return;
      if (lastOf(page) > settled) continue;
      const { content } = page;
      page.content = Bun.zstdCompressSync(content.subarray(0, bytesOf(page)), { level: 1 });
      page.packed = true;
      if (content.length === this.#pageSize) this.#spare = content;
    }
  }

  /** The frames from one number to another that a reader may have. Each is there until the next one is asked for. */
  read(from: number, to: number, reader: string): Iterable<Buffer> {
    const pages = this.pages.filter((page) => lastOf(page) >= from && page.first <= to);
    return framesIn(pages, from, to, reader);
  }

  /** Nobody is to have this frame again. */
  withdraw(number: number): void {
    const page = this.#pageOf(number);
    if (page) page.readers[number - page.first] = NOBODY;
  }

  /** Undefined if there is no such frame. */
  digest(number: number): number | undefined {
    const page = this.#pageOf(number);
    if (!page) return undefined;
    const { content, packed, first, ends } = page;
    const frames = packed ? Bun.zstdDecompressSync(content) : content;
    return Bun.hash.crc32(frames.subarray(ends[number - first - 1] ?? 0, ends[number - first]));
  }

  #pageOf(number: number): Page | undefined {
    const page = this.pages.findLast(({ first }) => first <= number);
    return page && number <= lastOf(page) ? page : undefined;
  }
}

/**
 * Puts packets into frames and frames onto the publishing connection. An idle server publishes at once; a busy one lets
 * the next frame grow while others are unconfirmed, for `SPACING` at most as long as the broker keeps up. Nagle's algorithm
 * (RFC 896), with confirms for acknowledgements.
 */
class Outbox {
  /** Frames given up before the broker had confirmed them. */
  dropped = 0;
  /** Their numbers. */
  readonly #droppedRuns: { from: number; to: number }[] = [];
  #channel: ConfirmChannel | undefined;
  #lose: Lose = () => {};
  #blocked = false;
  #closed = false;
  /** So far below `maxPayload` that neither multi-byte text nor the header reaches it. */
  readonly #frameSize: number;
  /** What is under way, waits, or is confirmed behind one that is not, by number. The rest is confirmed, or was dropped. */
  readonly #frames = new Map<number, Entry>();
  readonly #journal: Journal;
  #draft: Draft | undefined;
  #number = 0;
  /** The next to be sent on this connection, and the last that ever was its turn: sent, or dropped. */
  #next = 1;
  #reached = 0;
  /** On this channel. */
  #framesInFlight = 0;
  #bytesInFlight = 0;
  /** The latest frame (ms, monotonic). */
  #publishedAt = 0;
  /** Runs while a frame waits for that to be `SPACING` ago. */
  #spacing: Timeout | undefined;
  /** This one and all before it are confirmed, or gone. */
  #settled = 0;
  readonly #waiters: { number: number; resolve: () => void }[] = [];
  #scheduled = false;
  #droppedReported = 0;
  #dropReport: Timeout | undefined;
  #counts = { framesSent: 0, packetsSent: 0 };

  constructor(
    readonly uid: string,
    readonly names: Names,
    readonly settings: Pick<Settings, "maxPayload" | "journal">,
    readonly events: OutboxEvents,
  ) {
    this.#frameSize = Math.min(FRAME_SIZE, settings.maxPayload / 8);
    this.#journal = new Journal(settings.journal);
  }

  get connected(): boolean {
    return this.#channel !== undefined;
  }

  get stats() {
    return {
      ...this.#counts,
      journalBytes: this.#bytes,
      unconfirmed: this.#frames.size + Number(this.#draft !== undefined),
    };
  }

  get #bytes(): number {
    return this.#journal.bytes + this.#frames.size * ENTRY_OVERHEAD;
  }

  /** The number up to which all has been sent, once what had to be sent again is under way; undefined before. */
  get position(): number | undefined {
    return this.connected && !this.#blocked && this.#next > this.#reached ? this.#reached : undefined;
  }

  /** A packet for a destination. Volatile ones are dropped while the broker is away. */
  add(to: Destination, parts: readonly unknown[]): void {
    if (this.#closed || (to.volatile && (!this.#channel || this.#blocked))) return;
    let size = 0;
    for (const part of parts) size += partLength(part);
    if ((to.head.length + size) * 3 + OVERHEAD > this.settings.maxPayload && !this.#fits(to, parts)) return;
    let draft = this.#draft;
    if (draft && (draft.size + size > this.#frameSize || !sameDestination(draft.to, to))) {
      this.#seal(draft);
      draft = undefined;
    }
    draft ??= this.#draft = {
      to,
      at: performance.now(),
      table: [],
      binaries: [],
      text: "",
      packets: 0,
      size: to.head.length,
    };
    for (let i = 1; i <= parts.length; i++) {
      const part = parts[i - 1];
      const more = i < parts.length ? MORE_PARTS : 0;
      if (typeof part === "string") {
        draft.text += part;
        draft.table.push(part.length + more);
      } else {
        const binary = Buffer.from(asBinary(part)!); // a copy: the caller may reuse the buffer
        draft.binaries.push(binary);
        draft.table.push(binary.length + more + BINARY);
      }
    }
    draft.packets++;
    draft.size += size;
    if (!this.#scheduled) {
      this.#scheduled = true;
      queueMicrotask(this.#flush);
    }
  }

  #fits(to: Destination, parts: readonly unknown[]): boolean {
    const { maxPayload } = this.settings;
    let size = OVERHEAD + 4 * parts.length + Buffer.byteLength(to.head);
    for (const part of parts) size += typeof part === "string" ? Buffer.byteLength(part) : partLength(part);
    if (size <= maxPayload) return true;
    this.events.report(new RangeError(`A packet of ${size} bytes was not sent: maxPayload is ${maxPayload} bytes`));
    return false;
  }

  #seal(draft: Draft): void {
    this.#draft = undefined;
    const { to, at, packets } = draft;
    const number = ++this.#number;
    to.digests ??= [to.key, ...(to.options.CC ?? [])].map(digestOf);
    const place = (size: number) => this.#journal.add(number, at, size, readerOf(to));
    const body = encodeFrame(to.kind, this.uid, number, to.head, draft, this.#predecessorsOf(to), place);
    this.#frames.set(number, { to, number, body, packets, confirmed: false });
  }

  /**
   * The frames before the next one that are not confirmed yet, for the broker may deliver these in another order: of each
   * how many numbers back it is, and its digest.
   */
  #predecessorsOf(to: Destination): number[] {
    const predecessors: number[] = [];
    if (to.volatile) return predecessors;
    const first = Math.max(this.#settled + 1, this.#number - MAX_PREDECESSORS);
    for (let number = this.#number - 1; number >= first; number--) {
      const entry = this.#frames.get(number);
      if (!entry || entry.confirmed || entry.to.volatile) continue;
      for (const digest of entry.to.digests ?? []) {
        predecessors.push(this.#number - number, digest);
        if (predecessors.length === 2 * MAX_DIGESTS) return predecessors;
      }
    }
    return predecessors;
  }

  readonly #flush = (): void => {
    this.#scheduled = false;
    const draft = this.#draft;
    if (draft && performance.now() - draft.at > this.#journal.pageTime) this.#seal(draft);
    while (this.#channel && !this.#blocked && !this.#closed && this.#bytesInFlight < IN_FLIGHT) {
      if (this.#next > this.#number) {
        if (!this.#draft || this.#isEarly()) break;
        this.#seal(this.#draft);
      }
      const entry = this.#frames.get(this.#next);
      this.#advance();
      if (entry && !entry.confirmed) this.#publish(this.#channel, entry);
    }
    this.evict();
  };

  /** Whether the next frame is to grow on. */
  #isEarly(): boolean {
    if (this.#framesInFlight === 0) return false;
    const spacing = this.#framesInFlight < WINDOW ? SPACING : STALLED_SPACING;
    const early = spacing - (performance.now() - this.#publishedAt);
    if (early <= 0) return false;
    this.#spacing ??= setTimeout(() => {
      this.#spacing = undefined;
      this.#flush();
    }, early);
    return true;
  }

  #settle(): void {
    while (this.#settled + 1 < this.#next) {
      const entry = this.#frames.get(this.#settled + 1);
      if (entry && !entry.confirmed) break;
      this.#frames.delete(++this.#settled);
    }
    this.#journal.pack(this.#settled);
    while (this.#waiters[0] && this.#waiters[0].number <= this.#settled) this.#waiters.shift()?.resolve();
  }

  /** Waits up to `ms` until the broker has confirmed what was added so far. Resolves with how many frames it has not. */
  async confirmed(ms: number): Promise<number> {
    if (this.#draft) this.#seal(this.#draft);
    this.#flush();
    const number = this.#number;
    if (this.#settled < number) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#waiters.push({ number, resolve });
      await within(ms, promise);
    }
    return [...this.#frames.values()].filter((frame) => frame.number <= number && !frame.confirmed).length;
  }

  #publish(channel: ConfirmChannel, entry: Entry): void {
    const { to, number, body, packets } = entry;
    this.#publishedAt = performance.now();
    this.#framesInFlight++;
    this.#bytesInFlight += body.length;
    this.#counts.framesSent++;
    this.#counts.packetsSent += packets;
    try {
      channel.publish(to.exchange, to.key, body, to.options, (error: Error | null) => {
        if (channel !== this.#channel || (error && error.message !== NACKED)) return; // the channel has closed, and says so
        // A nack: a queue is full or gone. Not again, for the others have it; a server without a queue asks when it is back.
        if (error) debug("frame %d: %s", number, error.message);
        entry.confirmed = true;
        this.#framesInFlight--;
        this.#bytesInFlight -= body.length;
        this.#flush();
      });
    } catch (error) {
      this.#lose(asError(error)); // the channel has just closed
    }
  }

  /** Drops the pages that there is no room or time for: also those of frames that wait, but not of any that is under way. */
  evict(): void {
    const { bytes, ms } = this.settings.journal;
    const { pages } = this.#journal;
    const expired = performance.now() - ms;
    let underWay = 0;
    for (let i = 0; i < pages.length;) {
      const page = pages[i]!;
      const last = lastOf(page);
      const tooMany = this.#bytes - underWay > bytes && last < this.#number; // the newest page may be one large frame
      if (!tooMany && page.until >= expired) break;
      if (Math.max(page.first, this.#settled + 1) <= Math.min(last, this.#next - 1)) {
        underWay += bytesOf(page) + page.ends.length * ENTRY_OVERHEAD;
        i++;
        continue;
      }
      for (let number = Math.max(page.first, this.#next); number <= last; number++)
        this.#drop(this.#frames.get(number));
      this.#journal.drop(i);
    }
    this.#skip();
  }

  /** What has been dropped need not wait for its turn. */
  #skip(): void {
    while (this.#next <= this.#number && !this.#frames.has(this.#next)) this.#advance();
    this.#settle();
  }

  #advance(): void {
    this.#reached = Math.max(this.#reached, this.#next++);
  }

  /** Gives a frame up that the broker has not confirmed. */
  #drop(entry: Entry | undefined): void {
    if (!entry) return;
    this.#frames.delete(entry.number);
    if (entry.confirmed || entry.to.volatile) return;
    this.#countDropped(entry);
    if (!this.#closed) this.#dropReport ??= setTimeout(() => this.#reportDrops(), DROP_REPORT);
  }

  #countDropped({ number }: Entry): void {
    this.dropped++;
    const latest = this.#droppedRuns.at(-1);
    if (latest?.to === number - 1) latest.to = number;
    else if (this.#droppedRuns.push({ from: number, to: number }) > MAX_RUNS) this.#droppedRuns.shift();
  }

  /** How many frames with numbers between these two were dropped. */
  #droppedBetween(after: number, before: number): number {
    let count = 0;
    for (const { from, to } of this.#droppedRuns)
      count += Math.max(0, Math.min(to, before - 1) - Math.max(from, after + 1) + 1);
    return count;
  }

  #reportDrops(): void {
    clearTimeout(this.#dropReport);
    this.#dropReport = undefined;
    const frames = this.dropped - this.#droppedReported;
    this.#droppedReported = this.dropped;
    if (frames === 0) return;
    const { bytes, ms } = this.settings.journal;
    this.events.report(
      new Error(`Lost ${frames} frames that waited for the broker: the journal holds ${bytes} bytes and ${ms} ms`),
    );
  }

  // The publishing connection: one setup, for the start and after each loss.

  async up(model: AmqpConnection, lose: Lose): Promise<void> {
    this.#lose = lose;
    const channel = watched(await model.createConfirmChannel(), lose);
    channel.on("return", ({ fields }) => this.events.unreachable(fields.routingKey.slice(ALL_SERVERS.length)));
    const emitter: NodeJS.EventEmitter = model;
    emitter.on("blocked", (reason: string) => {
      this.#blocked = true;
      this.events.report(new Error(`The broker blocks publishing: ${reason}`));
    });
    emitter.on("unblocked", () => {
      this.#blocked = false;
      this.#flush();
      this.events.ready();
    });
    await declare(channel, this.names);
    if (this.#lose !== lose) return;
    this.#channel = channel;
    if (this.#draft) this.#seal(this.#draft);
    this.evict();
    this.#flush();
  }

  down(error: BrokerError): void {
    // A frame that is larger than the broker allows would close every next channel as well.
    if (error.code === 406 && error.classId === 60) this.#dropLargest(error);
    this.#channel = undefined;
    this.#lose = () => {};
    this.#blocked = false;
    this.#framesInFlight = this.#bytesInFlight = 0;
    if (this.#draft?.to.volatile) this.#draft = undefined;
    for (const { number, to } of this.#frames.values()) if (to.volatile) this.#frames.delete(number); // not after the outage
    // What was under way waits again: from the first frame that the broker has not confirmed, in order.
    this.#settle();
    this.#next = this.#settled + 1;
    this.#skip();
  }

  #dropLargest(error: Error): void {
    let largest: Entry | undefined;
    for (let number = this.#settled + 1; number < this.#next; number++) {
      const entry = this.#frames.get(number);
      if (entry && !entry.confirmed && entry.body.length > (largest?.body.length ?? 0)) largest = entry;
    }
    if (!largest) return;
    this.#journal.withdraw(largest.number);
    this.#frames.delete(largest.number);
    if (!largest.to.volatile) {
      this.#countDropped(largest);
      this.#droppedReported++;
    }
    this.events.report(
      new RangeError(
        `A frame of ${largest.body.length} bytes was refused by the broker: ${error.message}; lower maxPayload`,
      ),
    );
  }

  /** A message about the cluster itself: sent at once or not at all, and not numbered. Resolves with its success. */
  control(key: string, control: Control, attachment?: Buffer): Promise<boolean> {
    const channel = this.#channel;
    if (!channel || this.#blocked || this.#closed) return Promise.resolve(false);
    const json = JSON.stringify(control);
    const table = attachment ? [json.length + MORE_PARTS, attachment.length + BINARY] : [json.length];
    const content = { packets: 1, table, text: json, binaries: attachment ? [attachment] : [] };
    const body = encodeFrame(Kind.Control, this.uid, 0, "", content);
    const isForAll = key === ALL_SERVERS;
    return new Promise((resolve) => {
      // A nack of what is for all: some queues were full, the others have it.
      const confirmed = (error: Error | null) => resolve(!error || (isForAll && error.message === NACKED));
      try {
        channel.publish(this.names.keys, key, body, { mandatory: !isForAll }, confirmed);
      } catch {
        resolve(false); // the channel has just closed
      }
    });
  }

  /**
   * What a peer has missed, of what was sent: all after the last frame that it proves to have taken (frames that are older
   * than the journal need no proof), or after number `sure`. If it knows of none, all that the journal holds.
   */
  since(uid: string, taken: Taken[], sure?: number): Missed {
    this.evict();
    const oldest = this.#journal.oldest ?? this.#number + 1;
    const isGenuine = ([number, digest]: Taken) => number < oldest || this.#journal.digest(number) === digest;
    const claims = taken.filter(([number]) => number <= this.#reached).toSorted(([one], [other]) => other - one);
    const proved = claims.find(isGenuine)?.[0];
    const told = sure !== undefined && sure <= this.#reached ? sure : undefined;
    const after = proved === undefined ? told : Math.max(proved, told ?? 0);
    const to = this.#reached;
    const from = Math.max((after ?? 0) + 1, oldest);
    const lost = after === undefined ? 0 : from - after - 1 - this.#droppedBetween(after, from);
    return { from, lost, to, bodies: this.#journal.read(from, to, serverKey(uid)) };
  }

  /** Waits up to `ms` until the broker has confirmed everything, and says goodbye. */
  async close(ms: number): Promise<void> {
    const unconfirmed = await this.confirmed(ms);
    const goodbye = this.control(ALL_SERVERS, { type: "bye" });
    this.#closed = true; // nothing may come behind it
    clearTimeout(this.#spacing);
    await within(CLOSE_PATIENCE, goodbye);
    this.#reportDrops();
    if (unconfirmed > 0) throw new Error(`Closed before the broker confirmed ${unconfirmed} frames`);
  }
}

/** Tells what is published under a routing key from all else, but for one in 2^32. */
const digestOf = (key: string): number => Bun.hash.crc32(key);

/** Who may have a frame for this destination again. */
function readerOf({ volatile, key }: Destination): string | undefined {
  if (volatile) return NOBODY;
  return key.startsWith(ALL_SERVERS) ? key : undefined;
}

function sameDestination(a: Destination, b: Destination): boolean {
  return (
    a === b ||
    (a.head === b.head &&
      a.key === b.key &&
      a.exchange === b.exchange &&
      a.kind === b.kind &&
      a.volatile === b.volatile &&
      Bun.deepEquals(a.options, b.options)) // the keys of further rooms
  );
}

/** At most this many bytes of `CC`: the header has to fit into one AMQP frame (RabbitMQ: 128 KiB). */
const MAX_CC = 32 * 1024;
/** How many destinations are kept ready, for rooms that are emitted to again. */
const MAX_ROUTES = 4_096;

/** Which routing keys the packets of a namespace take. */
class Routes {
  readonly #key: string;
  /** By room; users pass `undefined` as well, and mean a room that nobody is in. */
  readonly #ready = new Map<Room | undefined, Destination>();
  #everyone: Destination | undefined;

  constructor(
    readonly nsp: string,
    readonly names: Names,
    /** Whether rooms named like a socket id have a key of their own. */
    readonly bound: boolean,
  ) {
    this.#key = namespaceKey(nsp);
  }

  packets({ rooms, except, flags }: BroadcastOptions): Destination {
    if (rooms.size > 1 || except?.size || flags?.volatile !== undefined || flags?.compress !== undefined)
      return this.#packets({ rooms, except, flags });
    // One room, or all: made once.
    if (rooms.size === 0) return (this.#everyone ??= this.#packets({ rooms }));
    const [room] = rooms as Set<Room | undefined>;
    let destination = this.#ready.get(room);
    if (!destination) {
      if (this.#ready.size >= MAX_ROUTES) this.#ready.clear();
      this.#ready.set(room, (destination = this.#packets({ rooms })));
    }
    return destination;
  }

  #packets({ rooms, except = new Set(), flags: { volatile, compress } = {} }: BroadcastOptions): Destination {
    const head = JSON.stringify([this.nsp, [...rooms], [...except], { volatile, compress }]);
    return this.#destination(Kind.Packets, this.#keys(rooms), head, Boolean(volatile));
  }

  message(message: Message): Destination {
    const toRooms =
      message.type === "packet" || message.type === "join" || message.type === "leave" || message.type === "disconnect";
    const keys = toRooms ? this.#keys(message.opts.rooms) : [this.#key];
    return this.#destination(
      Kind.Messages,
      keys,
      this.nsp,
      message.type === "packet" && Boolean(message.opts.flags.volatile),
    );
  }

  /** To one server. */
  direct(uid: string): Destination {
    return {
      kind: Kind.Messages,
      exchange: this.names.keys,
      key: serverKey(uid),
      options: { mandatory: true },
      head: this.nsp,
      volatile: false,
    };
  }

  #destination(kind: Kind, [key = this.#key, ...CC]: string[], head: string, volatile: boolean): Destination {
    return { kind, exchange: this.names.main, key, options: CC.length > 0 ? { CC } : {}, head, volatile };
  }

  #keys(rooms: Iterable<Room>): string[] {
    const keys = new Set<string>();
    let size = 0;
    for (const room of rooms) {
      if (!this.bound && isSocketId(room)) return [this.#key];
      const key = roomKey(this.nsp, room);
      keys.add(key);
      size += key.length * 3;
    }
    return size > MAX_CC ? [this.#key] : [...keys];
  }
}

// ── Frames: one AMQP message with one or more packets for the same destination ───────────────────────────────────────
//
//  0       1             2         10       16            20          24        28        32
//  ┌───────┬─────────────┬─────────┬────────┬─────────────┬───────────┬─────────┬─────────┬──────────┬────────────┬──────┬──────┬──────────┐
//  │version│ kind        │ sender  │ number │ head length │ n packets │ n parts │ m preds │ n × part │ m × pred   │ head │ text │ binaries │
//  │ 1     │ u8          │ 8 ASCII │ u48    │ u32         │ u32       │ u32     │ u32     │ u32      │ u32, u32   │      │      │          │
//  └───────┴─────────────┴─────────┴────────┴─────────────┴───────────┴─────────┴─────────┴──────────┴────────────┴──────┴──────┴──────────┘
//
// A part is a string or a binary of its packet: its length (UTF-16 code units or bytes), with a bit for a binary and one
// for a packet that has more parts. All strings stand in one piece of UTF-8, so they are decoded with one call. The
// predecessors: frames that were not confirmed yet when this one was made, each by how many numbers back and the digest of its
// exchange and key, the nearest first.

enum Kind {
  /** Encoded by the sender's parser. The head is the JSON of a PacketsHead. */
  Packets = 1,
  /** `Message`s between servers. The head is the namespace. */
  Messages = 2,
  /** A `Control` message between members. Not numbered. */
  Control = 3,
}

interface Frame {
  readonly kind: Kind;
  readonly sender: string;
  readonly number: number;
  readonly packets: number;
  readonly head: string;
  readonly body: Buffer;
}

/** The packets of a frame. */
interface Content {
  packets: number;
  /** Of each part its length, and what it is. */
  readonly table: number[];
  text: string;
  readonly binaries: Uint8Array[];
}

type Part = string | Uint8Array;

const VERSION = 1;
const HEADER = 32;
/** How many predecessors a frame names at most, and how many digests of them. */
const MAX_PREDECESSORS = 8;
const MAX_DIGESTS = 64;
const BINARY = 2 ** 31;
const MORE_PARTS = 2 ** 30;

/** A message that cannot be read: malformed, or not ours. */
class FrameError extends Error {}
class UnknownVersion extends FrameError {
  constructor(
    version: number,
    readonly sender: string,
  ) {
    super(`a frame of version ${version}; this adapter reads version ${VERSION}: update the older servers`);
  }
}

/** `place` gives a buffer of exactly the size that is asked for. */
function encodeFrame(
  kind: Kind,
  sender: string,
  number: number,
  head: string,
  { packets, table, text, binaries }: Content,
  predecessors: number[] = [],
  place = (size: number): Buffer => Buffer.allocUnsafe(size),
): Buffer {
  const headLength = Buffer.byteLength(head);
  const textLength = Buffer.byteLength(text);
  const binaryLength = binaries.reduce((sum, binary) => sum + binary.length, 0);
  const frame = place(HEADER + (table.length + predecessors.length) * 4 + headLength + textLength + binaryLength);
  frame[0] = VERSION;
  frame[1] = kind;
  frame.write(sender, 2, "latin1");
  frame.writeUIntBE(number, 10, 6);
  frame.writeUInt32BE(headLength, 16);
  frame.writeUInt32BE(packets, 20);
  frame.writeUInt32BE(table.length, 24);
  frame.writeUInt32BE(predecessors.length / 2, 28);
  let offset = HEADER;
  for (const part of table) offset = frame.writeUInt32BE(part, offset);
  for (const word of predecessors) offset = frame.writeUInt32BE(word, offset);
  offset += frame.write(head, offset);
  offset += frame.write(text, offset);
  for (const binary of binaries) {
    frame.set(binary, offset);
    offset += binary.length;
  }
  return frame;
}

/** The header and head. The packets are read when somebody wants them. */
function readFrame(body: Buffer): Frame {
  const version = body[0];
  if (version === undefined || version === 0 || version >= 0x20 || body.length < HEADER)
    throw new FrameError(`neither a frame nor of content type application/json (${body.length} bytes)`);
  if (version !== VERSION) throw new UnknownVersion(version, body.toString("latin1", 2, 10));
  const kind = body[1]!;
  const headLength = body.readUInt32BE(16);
  const parts = body.readUInt32BE(24);
  const headStart = headStartOf(body);
  const isPossible = kind >= Kind.Packets && kind <= Kind.Control && body.readUInt32BE(28) <= MAX_DIGESTS;
  if (!isPossible || headStart + headLength > body.length)
    throw new FrameError(`a malformed frame (kind ${kind}, ${parts} parts in ${body.length} bytes)`);
  return {
    kind,
    sender: body.toString("latin1", 2, 10),
    number: body.readUIntBE(10, 6),
    packets: body.readUInt32BE(20),
    head: body.toString("utf8", headStart, headStart + headLength),
    body,
  };
}

function headStartOf(body: Buffer): number {
  return HEADER + (body.readUInt32BE(24) + body.readUInt32BE(28) * 2) * 4;
}

/** The packets of a frame, each with its parts. */
function packetsOf({ body }: Frame): Part[][] {
  const parts = body.readUInt32BE(24);
  const textStart = headStartOf(body) + body.readUInt32BE(16);
  let binary = body.length;
  for (let i = 0; i < parts; i++) {
    const part = body.readUInt32BE(HEADER + i * 4);
    if (part >= BINARY) binary -= (part - BINARY) % MORE_PARTS;
  }
  if (binary < textStart) throw new FrameError("a frame with more binary than bytes");
  const text = body.toString("utf8", textStart, binary);
  const packets: Part[][] = [];
  let packet: Part[] = [];
  let position = 0;
  for (let i = 0; i < parts; i++) {
    const part = body.readUInt32BE(HEADER + i * 4);
    const length = part % MORE_PARTS;
    if (part >= BINARY) packet.push(body.subarray(binary, (binary += length)));
    else packet.push(text.substring(position, (position += length)));
    if (((part >>> 30) & 1) === 0) {
      packets.push(packet);
      packet = [];
    }
  }
  if (position !== text.length) throw new FrameError("a frame whose strings do not fill its text");
  return packets;
}

/** Namespace, rooms, except and flags of a frame's packets. */
interface PacketsHead {
  readonly nsp: string;
  readonly opts: BroadcastOptions;
}

/** Heads come again and again: parsed once. */
const heads = new Map<string, PacketsHead>();

function packetsHead(text: string): PacketsHead {
  let head = heads.get(text);
  if (!head) {
    const value = parseJson(text, NAMED_ARRAY);
    if (!Array.isArray(value)) throw new FrameError("a frame whose head is no array");
    const [nsp, rooms, except, flags] = value as unknown[];
    if (typeof nsp !== "string" || !isRooms(rooms) || !isRooms(except) || !isRecord(flags))
      throw new FrameError("a frame whose head is not [namespace, rooms, except, flags]");
    head = { nsp, opts: { rooms: new Set(rooms), except: new Set(except), flags } };
    if (heads.size >= MAX_ROUTES) heads.clear();
    if (text.length < 1024) heads.set(text, head);
  }
  return head;
}

// ── Values: JSON with binary at any depth ────────────────────────────────────────────────────────────────────────────

interface WireOptions {
  rooms: Room[];
  except: Room[];
  flags: BroadcastFlags;
}

/** What servers and emitters tell each other about a namespace. */
type Message =
  | { type: "packet"; opts: WireOptions; data: unknown[] }
  | { type: "join" | "leave"; opts: WireOptions; rooms: Room[] }
  | { type: "disconnect"; opts: WireOptions; close: boolean }
  | { type: "emit"; id: number | undefined; args: unknown[] }
  | { type: "fetch"; id: number; opts: WireOptions }
  | { type: "broadcast"; id: number; opts: WireOptions; data: unknown[] }
  | Answer;
type Answer =
  | { type: "sockets"; id: number; sockets: unknown[]; more: boolean }
  | { type: "answer" | "ack"; id: number; value?: unknown }
  | { type: "clients"; id: number; count: number };

/** What members tell each other about themselves. */
type Control =
  /** What is open, and the last number sent; `reply` asks for the same. */
  | { type: "hello"; namespaces: string[]; revision: number; reply: boolean; position: number | undefined }
  /** Alive; everything up to `position` has been sent. */
  | { type: "beat"; revision: number; position: number }
  /** Closing. */
  | { type: "bye" }
  /** Comes back if there is no queue. */
  | { type: "ping" }
  /** A peer's queue is gone; whoever knows it may look for itself. */
  | { type: "missing"; uid: string }
  /** Asks for the frames after the last one that was `taken`, or after `sure`, if all up to there has come. */
  | { type: "ask"; id: number; sure?: number | undefined; taken: Taken[] }
  /** The answer: all from number `from` up to `to`, `lost` before them are gone; then each frame again; then the end. */
  | { type: "begin"; id: number; from: number; lost: number; to: number }
  | { type: "again"; id: number; index: number }
  | { type: "end"; id: number; count: number };

type Check = (value: Record<string, unknown>) => boolean;
type Checks<T extends { type: string }> = Record<T["type"], Check>;

const isNumber = (value: unknown): boolean => Number.isSafeInteger(value) && Number(value) >= 0;
const isRoom = (value: unknown): boolean => typeof value === "string" || typeof value === "number";
/** Users emit to `undefined` as well, which JSON makes null, and mean a room that nobody is in. */
const isRooms = (value: unknown): value is Room[] =>
  Array.isArray(value) && value.every((room) => isRoom(room) || room === null);
const isOptions = (value: unknown): boolean =>
  isRecord(value) && isRooms(value.rooms) && isRooms(value.except) && isRecord(value.flags);

const MESSAGES: Checks<Message> = {
  packet: ({ opts, data }) => isOptions(opts) && Array.isArray(data),
  join: ({ opts, rooms }) => isOptions(opts) && isRooms(rooms) && rooms.every(isRoom),
  leave: ({ opts, rooms }) => isOptions(opts) && isRooms(rooms) && rooms.every(isRoom),
  disconnect: ({ opts }) => isOptions(opts),
  emit: ({ id, args }) => (id === undefined || isNumber(id)) && Array.isArray(args),
  fetch: ({ id, opts }) => isNumber(id) && isOptions(opts),
  broadcast: ({ id, opts, data }) => isNumber(id) && isOptions(opts) && Array.isArray(data),
  sockets: ({ id, sockets }) => isNumber(id) && Array.isArray(sockets),
  answer: ({ id }) => isNumber(id),
  ack: ({ id }) => isNumber(id),
  clients: ({ id, count }) => isNumber(id) && isNumber(count),
};
const CONTROLS: Checks<Control> = {
  hello: ({ namespaces, revision, position }) =>
    Array.isArray(namespaces) &&
    namespaces.every((nsp) => typeof nsp === "string") &&
    isNumber(revision) &&
    (position === undefined || isNumber(position)),
  beat: ({ revision, position }) => isNumber(revision) && isNumber(position),
  bye: () => true,
  ping: () => true,
  missing: ({ uid }) => typeof uid === "string",
  ask: ({ id, sure, taken }) =>
    isNumber(id) &&
    (sure === undefined || isNumber(sure)) &&
    Array.isArray(taken) &&
    taken.length <= EVIDENCE && // for each a page may have to be unpacked
    taken.every((frame) => Array.isArray(frame) && frame.length === 2 && frame.every(isNumber)),
  begin: ({ id, from, lost, to }) => isNumber(id) && isNumber(from) && isNumber(lost) && isNumber(to),
  again: ({ id, index }) => isNumber(id) && isNumber(index),
  end: ({ id, count }) => isNumber(id) && isNumber(count),
};

function isOneOf<T extends { type: string }>(checks: Checks<T>, value: unknown): value is T {
  if (!isRecord(value)) return false;
  const type = value["type"];
  return typeof type === "string" && Object.hasOwn(checks, type) && checks[type as T["type"]](value);
}

function asMessage(value: unknown): Message {
  if (isOneOf<Message>(MESSAGES, value)) return value;
  throw new FrameError(`a message that is none of ${Object.keys(MESSAGES).join(", ")}`);
}

function asControl(value: unknown): Control {
  if (isOneOf<Control>(CONTROLS, value)) return value;
  throw new FrameError(`a control message that is none of ${Object.keys(CONTROLS).join(", ")}`);
}

/** JSON, with binary replaced by placeholders as the Socket.IO protocol has them, and the binaries behind it. */
function encodeValue(value: unknown): Part[] {
  const binaries: Uint8Array[] = [];
  const json = JSON.stringify(value, function (this: Record<string, unknown>, key, replaced: unknown) {
    const original = this[key]; // before Buffer's toJSON
    const binary = asBinary(original);
    return binary ? { _placeholder: true, num: binaries.push(binary) - 1 } : replaced;
  });
  return [json, ...binaries];
}

/** Bytes and UTF-16 code units. */
const encodedLength = (value: unknown): number => encodeValue(value).reduce((sum, part) => sum + partLength(part), 0);

function decodeValue([json, ...binaries]: Part[]): unknown {
  return parseJson(
    json,
    OBJECT,
    binaries.length === 0
      ? undefined
      : (value) => {
          if (!isRecord(value) || value._placeholder !== true || typeof value.num !== "number") return value;
          return binaries[value.num] ?? value;
        },
  );
}

/** How JSON begins, and what is meant. */
type Opening = readonly [RegExp, string];
const OBJECT: Opening = [/^\s*\{/, "an object"];
const NAMED_ARRAY: Opening = [/^\s*\[\s*"/, "an array that begins with a string"];

/** Looks at the beginning first, for it takes milliseconds to parse a few thousand nested brackets. */
function parseJson(text: unknown, [opening, expected]: Opening, revive?: (value: unknown) => unknown): unknown {
  if (typeof text !== "string") throw new FrameError("binary where JSON was expected");
  if (!opening.test(text)) throw new FrameError(`${JSON.stringify(text.slice(0, 20))}; expected ${expected}`);
  try {
    return JSON.parse(text, revive && ((_, value: unknown) => revive(value)));
  } catch (error) {
    throw new FrameError(`not JSON: ${asError(error).message}`);
  }
}

function asBinary(value: unknown): Uint8Array | undefined {
  if (value instanceof Uint8Array) return value;
  if (value instanceof ArrayBuffer || value instanceof SharedArrayBuffer) return new Uint8Array(value);
  if (ArrayBuffer.isView(value)) return new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
  return undefined;
}

/** In UTF-16 code units or bytes. */
function partLength(part: unknown): number {
  const length = typeof part === "string" ? part.length : asBinary(part)?.length;
  if (length !== undefined) return length;
  throw new TypeError(
    `Cannot send ${Bun.inspect(part)} to other servers; expected a string, a buffer or a typed array`,
  );
}

function toWire({ rooms, except = new Set(), flags: { volatile, compress } = {} }: BroadcastOptions): WireOptions {
  return { rooms: [...rooms], except: [...except], flags: { volatile, compress } };
}

function fromWire({ rooms, except, flags }: WireOptions): BroadcastOptions {
  return { rooms: new Set(rooms), except: new Set(except), flags };
}

function asError(error: unknown): Error {
  return error instanceof Error ? error : new Error(String(error));
}

// ── Names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Routing keys: `/chat` is everyone in a namespace, `/chat#room42` a room, `@` all servers, `@<uid>` one server. */
const ALL_SERVERS = "@";
const serverKey = (uid: string): string => `${ALL_SERVERS}${uid}`;
/** How a key or name begins that would have been too long: its SHA-256 follows. No other key begins like this. */
const HASHED = "%";
/** AMQP 0-9-1: names and routing keys are short strings. */
const MAX_BYTES = 255;

const isShort = (name: string): boolean => name.length * 3 <= MAX_BYTES || Buffer.byteLength(name) <= MAX_BYTES;
const short = (key: string): string =>
  isShort(key) ? key : `${HASHED}${createHash("sha256").update(key).digest("hex")}`;
/** `#` and `%` are escaped, or namespace `/a#b` would claim the key of room `b` in `/a`. */
const escaped = (nsp: string): string =>
  /[%#]/.test(nsp) ? nsp.replace(/[%#]/g, (char) => (char === "#" ? "%23" : "%25")) : nsp;

/** The namespace of a key that is not hashed. */
const namespaceOf = (key: string): string => {
  const end = key.indexOf("#");
  const nsp = end < 0 ? key : key.slice(0, end);
  return nsp.includes("%") ? nsp.replace(/%2[35]/g, (code) => (code === "%23" ? "#" : "%")) : nsp;
};
const namespaceKey = (nsp: string): string => short(escaped(nsp));
const roomKey = (nsp: string, room: Room): string => short(`${escaped(nsp)}#${room}`);

/** The rooms that share the key of this name: Socket.IO takes numbers for rooms, and tells 1 from "1". */
function roomsNamed(name: string): Room[] {
  const number: unknown = Number(name);
  return String(number) === name ? [name, number as Room] : [name];
}

function isSocketId(room: Room): boolean {
  return typeof room === "string" && room.length === 20 && /^[\w-]+$/.test(room);
}

class Names {
  /** Everybody publishes to it. */
  readonly main: string;
  /** Behind it: queues are bound to it by routing key. */
  readonly keys: string;

  constructor(readonly prefix: string) {
    this.main = prefix;
    this.keys = `${prefix}#keys`;
  }

  roomExchange(key: string): string {
    const name = `${this.prefix}#${key}`;
    return isShort(name) ? name : `${this.prefix}#${HASHED}${createHash("sha256").update(key).digest("hex")}`;
  }

  queue(uid: string, generation: number): string {
    return `${this.prefix}#@${uid}.${generation}`;
  }
}
