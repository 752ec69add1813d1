/**
 * socket.io-amqp0: the Socket.IO adapter for AMQP 0-9-1 brokers (RabbitMQ and its kin), for Bun.
 *
 *   io.to("room42").emit()                                 each server that holds sockets of room42: one exclusive queue
 *          │                                                                            ▲
 *          ▼                                                                            │ bound by the first local join,
 *   exchange socket.io ───────► exchange socket.io#keys ──"/#room42", "/", "@", …────────┘ unbound by the last local leave
 *   (fanout, durable)           (direct, durable)
 *
 * Sections: what you call · the adapter (Socket.IO's side) · recovery (of lost clients) · the emitter · the node (one server's
 * place in the cluster) · receiving · sending · bindings · connections · the wire · values · names.
 *
 * Words:
 *   packet       what one emit sends to clients, in the parser's encoding; a message is what servers send each other (a join)
 *   section      consecutive packets for the same rooms
 *   frame        an AMQP message with the sections of one namespace; numbered by its sender, unless it is volatile
 *   floor        every number up to it is confirmed by the broker
 *   predecessor  an earlier, unconfirmed frame that a frame names
 *   log          frames that are kept: a publisher's, to be sent again (users say journal), or a namespace's, for lost clients
 *   stream       the frames that came from one peer; its cursor: every number up to it has come, was for others, or is lost
 *   catch-up     a stream that may have missed frames holds those that come until the peer has sent the others again
 *   session      a lost client's rooms and data, which wait for it; it moves while another server hands it over, or its client is
 *                being connected; a position: how many packets a server had delivered
 *   offset       a server's name and a position, which goes to clients with each packet
 *   key          a routing key: `/chat` is a namespace, `/chat#room42` a room, `@` all servers, `@<uid>` one
 *   peer, node   another server or emitter; this one
 *
 * The life of a packet:
 *   1. `broadcast()` encodes it once and writes it to the local sockets; `Routes` names its destination.
 *   2. It waits in the `Batcher`, until the end of the turn or longer, where the broker is slower than the emits.
 *   3. `Publisher` makes a frame of what waits, numbers it, keeps it in its `FrameLog` and publishes it.
 *   4. The broker routes it by its keys to the queues of the servers that hold the rooms; its confirm moves the floor.
 *   5. The peer's `PeerStream` puts it in order with what came before, or holds it while something is missing.
 *   6. `readSections` takes it apart, and `LocalAdapter` writes each packet to the sockets of its rooms, as it is.
 */
import { createHash, randomBytes, randomUUID } from "node:crypto";
import type { Socket as TcpSocket } from "node:net";
import { debuglog } from "node:util";
import type { Channel, ChannelModel, ConsumeMessage, Options } from "amqplib";
import { Adapter, type BroadcastFlags, type BroadcastOptions, type Room, type SocketId } from "socket.io-adapter";
import type { Session as Restored } from "socket.io-adapter";

/** Set `NODE_DEBUG=socket.io-amqp0` to see each reported error, and those of the broker that are handled. */
const debug = debuglog("socket.io-amqp0");

// ── What you call ────────────────────────────────────────────────────────────────────────────────────────────────────

/** @internal What a simulation needs: none of it does I/O. */
export { PeerStream, predecessorsOf, Publisher, readFrame, readSections, Routes, takePackets };

/** What amqplib's `connect()` resolves to, without its option `recovery`: the adapter opens new connections itself. */
export type AmqpConnection = ChannelModel;

/** Which published frames are kept, to be sent again after a cut connection or a broker restart. */
export interface JournalOptions {
  /**
   * How many bytes are kept. Several times `maxPayload`, or one large packet pushes all others out.
   * @default 67_108_864 (64 MiB)
   */
  bytes?: number | undefined;
  /**
   * How long a frame is kept, in ms: the longest outage that loses nothing. Give all servers the same.
   * @default 60_000
   */
  ms?: number | undefined;
}

/** What a server and an emitter need. */
interface NodeOptions {
  /**
   * Opens a connection, as `() => connect("amqp://localhost")`. Each call must return a new one, which the adapter closes.
   * A Socket.IO server needs two, one that consumes and one that publishes, for RabbitMQ blocks publishers when it runs low on
   * memory or disk. After a loss it is called again after 100 ms, doubled each time up to 1 s, or up to 10 s where the broker
   * refuses, less up to a half. With a `heartbeat` of 5 s (`amqp://localhost?heartbeat=5`) a dead link is noticed within 15 s.
   * Without one RabbitMQ's 60 s apply, and it takes up to 180 s: longer than the default `journal.ms`, so packets are lost.
   */
  amqpConnection: () => AmqpConnection | Promise<AmqpConnection>;
  /**
   * What the names of all exchanges and queues begin with; servers with different prefixes do not meet.
   * @default "socket.io"
   */
  prefix?: string | undefined;
  /**
   * The largest packet, in bytes. A larger one is delivered locally only, and reported as an `error`. The broker's own limit
   * (RabbitMQ 4: `max_message_size`, 16 MiB; RabbitMQ 3: 128 MiB) must not be smaller.
   * @default 16_777_216 (16 MiB)
   */
  maxPayload?: number | undefined;
  /** What is kept to be sent again after an outage. */
  journal?: JournalOptions | undefined;
  /**
   * How many bytes of packets may wait while the broker is away, blocked or slower than the emits. Beyond it the oldest are
   * dropped, and so is what waited longer than `journal.ms` while the broker was away; `stats.dropped` counts them, and an
   * `error` reports them.
   * @default 268_435_456 (256 MiB)
   */
  maxQueued?: number | undefined;
}

export interface AdapterOptions extends NodeOptions {
  /**
   * Whether each room of a server with up to 100 rooms gets an exchange, `<prefix>#<namespace>#<room>`, to which other AMQP
   * clients can publish and bind. `undefined`: before RabbitMQ 4.0. `true`: also on 4.0 and 4.1, which bear it without Khepri;
   * from 4.2 on it is refused with an error, for there it destroys the broker's metadata. `false`: never. Servers with
   * different values work together.
   * @default undefined
   */
  roomExchanges?: boolean | undefined;
  /**
   * How rooms travel that are named like a socket id (20 characters of `A-Z a-z 0-9 _ -`). `"shared"`: to every server of the
   * namespace, so that a connecting client costs the broker nothing. `"bound"`: like any room. Give all servers the same.
   * @default "shared"
   */
  socketRooms?: "shared" | "bound" | undefined;
  /**
   * How long `fetchSockets()` and `serverSideEmit()` wait for the other servers, `io.close()` for the broker, and a client that
   * comes back for a server that has its session, in ms.
   * @default 5_000
   */
  requestsTimeout?: number | undefined;
  /**
   * How often a server tells the others that it is alive, in ms.
   * @default 5_000
   */
  heartbeatInterval?: number | undefined;
  /**
   * After how many ms of silence another server is no longer counted or waited for. One whose process has ended is noticed
   * sooner, for its queue goes: within 250 ms where it owes an answer, else when it misses a heartbeat. A server whose queue
   * brings nothing for so long, not even its own heartbeats, opens a new connection.
   * @default 10_000
   */
  heartbeatTimeout?: number | undefined;
  /**
   * With Socket.IO's `connectionStateRecovery`: how many bytes of delivered packets each namespace keeps for clients that may
   * come back. Who has missed more than that begins anew.
   * @default 67_108_864 (64 MiB)
   */
  recoveryBytes?: number | undefined;
  /**
   * Arguments for the server's queue. With a length limit the broker drops messages without a report.
   * @default {}
   */
  queueArguments?: object | undefined;
}

export interface EmitterOptions extends NodeOptions {
  /** Called with what a user should know: a lost connection, a refused permission, a packet that could not be sent. */
  onError?: ((error: Error) => void) | undefined;
  /**
   * How long `close()` waits until the broker has confirmed everything, in ms.
   * @default 30_000
   */
  closeTimeout?: number | undefined;
  /** The parser of the Socket.IO servers, if not the default one. Without it, arguments travel as JSON with binary. */
  parser?: Parser | undefined;
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
  /** Frames that this server had missed or held back until peers sent them again. */
  replayed: number;
  /** Frames that came a second time, after an outage, and were dropped. */
  duplicates: number;
  /** Frames of other servers that did not come here and could not be replayed. Some may have been for others. */
  lost: number;
  /** Packets of this server that were not sent: too many waited, or for too long, or they were too large. */
  dropped: number;
  /** Packets that wait to be sent, and how many bytes they take. */
  queued: number;
  queuedBytes: number;
  /** Of the published frames that are kept. */
  journalBytes: number;
  /** Frames that the broker has not confirmed yet. */
  unconfirmed: number;
  reconnects: { consuming: number; publishing: number };
  lastError: Error | undefined;
}

/** What `console.log(adapter.stats)` prints. */
const describeStats = (stats: AdapterStats): string => `AdapterStats
  ${stats.connected ? "connected" : "not connected"}; ${stats.rooms} rooms; reconnects: ${stats.reconnects.consuming} consuming, ${stats.reconnects.publishing} publishing
  sent ${stats.packetsSent} packets in ${stats.framesSent} frames, received ${stats.packetsReceived} in ${stats.framesReceived}
  waiting: ${stats.queued} packets (${stats.queuedBytes} bytes); unconfirmed: ${stats.unconfirmed} frames; journal: ${stats.journalBytes} bytes
  replayed ${stats.replayed}, duplicates ${stats.duplicates}, lost ${stats.lost}, dropped ${stats.dropped}
  last error: ${stats.lastError?.message ?? "none"}`;

/**
 * The adapter for `io.adapter(…)` or `new Server({ adapter: … })`. One result may serve several servers.
 * @throws TypeError if an option is wrong
 */
export function createAdapter(options: AdapterOptions): (nsp: Namespace) => AmqpAdapter {
  const settings = checked(options, ADAPTER_OPTIONS);
  const nodes = new WeakMap<object, Node>();
  // A function, not an arrow: Socket.IO calls it with `new`.
  return function (nsp: Namespace): AmqpAdapter {
    let node = nodes.get(nsp.server);
    // A server that was closed stays closed, until it is given an adapter anew.
    if (!node || (node.closing && nsp.name === "/"))
      nodes.set(nsp.server, (node = new Node(settings, nsp.server.encoder)));
    return new AmqpAdapter(nsp, node);
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
  const settings = checked(options, EMITTER_OPTIONS);
  const encoder = settings.parser && (new settings.parser.Encoder() as Encoder);
  const node = new Node(settings, encoder, settings.onError?.bind(options));
  node.start();
  return new Emitter<Events>(node, encoder);
}

/** Options with their defaults. */
type Given<T> = { [K in keyof T]-?: Exclude<T[K], undefined> };
type Settings = Given<Omit<AdapterOptions, "roomExchanges" | "journal">> &
  Given<Pick<EmitterOptions, "closeTimeout">> &
  Pick<AdapterOptions, "roomExchanges"> & { journal: Given<JournalOptions> };
type Check = (value: unknown) => boolean;
type Expectation = [expected: string, meets: Check];

const MiB = 1024 * 1024;
/** The longest time of a timer, in ms. */
const MAX_TIMEOUT = 2 ** 31 - 1;
const DEFAULTS = {
  prefix: "socket.io",
  socketRooms: "shared" as const,
  requestsTimeout: 5_000,
  heartbeatInterval: 5_000,
  heartbeatTimeout: 10_000,
  recoveryBytes: 64 * MiB,
  queueArguments: {},
  maxPayload: 16 * MiB,
  journal: {},
  maxQueued: 256 * MiB,
  closeTimeout: 30_000,
};

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);
function optional(check: Check): Check {
  return (value) => value === undefined || check(value);
}
const isFunction: Check = (value) => typeof value === "function";
const isPositive: Check = (value) => typeof value === "number" && value > 0;
const isBelow2To31: Check = (value) => isPositive(value) && Number(value) <= MAX_TIMEOUT;
const milliseconds: Expectation = ["a positive number of ms below 2^31", isBelow2To31];
const bytes: Expectation = ["a positive number of bytes", isPositive];

const NODE_OPTIONS: Record<string, Expectation> = {
  amqpConnection: ['a function that returns a connection, as () => connect("amqp://localhost")', isFunction],
  prefix: [
    'a string of 1 to 100 bytes without "#" or line ends that does not begin with "amq."',
    (value) => typeof value === "string" && /^(?!amq\.)[^#\r\n]+$/.test(value) && Buffer.byteLength(value) <= 100,
  ],
  maxPayload: ["a positive number of bytes below 2^30", (value) => isPositive(value) && Number(value) < 2 ** 30],
  maxQueued: bytes,
  journal: [
    "{ bytes?, ms? }, positive numbers below 2^31",
    (value) =>
      isRecord(value) &&
      Object.entries(value).every(([key, n]) => /^(bytes|ms)$/.test(key) && optional(isBelow2To31)(n)),
  ],
};
const ADAPTER_OPTIONS: Record<string, Expectation> = {
  ...NODE_OPTIONS,
  roomExchanges: ["true or false", optional((value) => typeof value === "boolean")],
  socketRooms: ['"shared" or "bound"', (value) => value === "shared" || value === "bound"],
  requestsTimeout: milliseconds,
  heartbeatInterval: milliseconds,
  heartbeatTimeout: milliseconds,
  recoveryBytes: bytes,
  queueArguments: ["an object", isRecord],
};
const EMITTER_OPTIONS: Record<string, Expectation> = {
  ...NODE_OPTIONS,
  onError: ["a function", optional(isFunction)],
  closeTimeout: milliseconds,
  parser: ["what Socket.IO takes as a parser", optional((value) => isFunction(Object(value)["Encoder"]))],
};

/** The name that has the most pairs of letters in common with this one. */
function nearest(name: string, names: string[]): string {
  const pairs = (word: string) =>
    new Set([...word.toLowerCase()].map((letter, i, letters) => letter + (letters[i + 1] ?? "")));
  const likeness = (other: string) => pairs(name).intersection(pairs(other)).size / Math.max(name.length, other.length);
  return names.reduce((best, other) => (likeness(other) > likeness(best) ? other : best));
}

/** The options with their defaults. @throws TypeError for the first one that is wrong */
function checked<T extends NodeOptions>(options: T, expectations: Record<string, Expectation>): Settings & T {
  const refusal = (name: string, expected: string, value: unknown) =>
    new TypeError(`Expected ${name} to be ${expected}, got ${Bun.inspect(value)} (${typeof value})`);
  if (!isRecord(options)) throw refusal("the options", "an object with amqpConnection", options);
  const names = Object.keys(expectations);
  const unknown = Object.keys(options).find((name) => !names.includes(name) && options[name] !== undefined);
  if (unknown !== undefined)
    throw new TypeError(
      `Unknown option ${unknown}: did you mean ${nearest(unknown, names)}? There are ${names.join(", ")}`,
    );
  const settings = { ...DEFAULTS, ...options };
  for (const [name, [expected, meets]] of Object.entries(expectations)) {
    const { [name]: value = Reflect.get(DEFAULTS, name) } = options; // one by one: they may be getters of a class
    if (!meets(value)) throw refusal(name, expected, value);
    Reflect.set(settings, name, value);
  }
  const { heartbeatInterval, heartbeatTimeout, journal } = settings;
  if (heartbeatTimeout <= heartbeatInterval)
    throw refusal("heartbeatTimeout", `more than heartbeatInterval (${heartbeatInterval})`, heartbeatTimeout);
  const { bytes = 64 * MiB, ms = 60_000 }: JournalOptions = journal;
  const amqpConnection = () => options.amqpConnection(); // it may be a method of a class
  return { ...settings, amqpConnection, journal: { bytes, ms } };
}

// ── The adapter ──────────────────────────────────────────────────────────────────────────────────────────────────────

/** What the adapter uses of Socket.IO's classes, which socket.io-adapter types as `any`. */
export interface Namespace {
  readonly name: string;
  readonly server: { readonly encoder: Encoder };
}
/** The same, with what Socket.IO's types hide or say in another way. */
interface OpenNamespace extends Namespace, Pick<NodeJS.EventEmitter, "prependListener" | "off"> {
  readonly adapter?: { readonly "socket.io-amqp0"?: true; close(): unknown };
  readonly server: Namespace["server"] & {
    readonly _parser: { Decoder: new (options?: object) => Decoder };
    readonly opts?: ServerOptions;
  };
  readonly sockets: Map<SocketId, Socket>;
  /** Sockets that are not connected yet: their middlewares run. From Socket.IO 4.8 on. */
  readonly _preConnectSockets?: Map<SocketId, unknown>;
  /** Runs the middlewares. */
  run(socket: unknown, next: unknown): void;
  /** A socket goes. That of a namespace that is made from a pattern may close the namespace. */
  _remove(socket: { readonly id: SocketId }): void;
  _onServerSideEmit(args: unknown[]): void;
  /** The next id of a packet that clients acknowledge. */
  _ids: number;
}
interface ServerOptions {
  readonly connectionStateRecovery?: { readonly maxDisconnectionDuration: number };
  readonly pingInterval?: number;
  readonly pingTimeout?: number;
}
/** What Socket.IO takes as its `parser` option, as far as it is used here. */
export interface Parser {
  /** `encode()` returns a list of strings and buffers. The types of socket.io-msgpack-parser say `ArrayBuffer`. */
  Encoder: new () => { encode(packet: never): readonly unknown[] | ArrayBuffer };
  Decoder?: unknown;
}
type Encoder = { encode(packet: Packet): unknown[] };
type Decoder = Pick<NodeJS.EventEmitter, "on"> & { add(part: unknown): void; destroy(): void };
interface EngineConnection extends Pick<NodeJS.EventEmitter, "once"> {
  readonly transport: { readonly writable: boolean };
  close(): void;
  sendPacket(type: "ping"): void;
}
interface Socket {
  readonly id: SocketId;
  readonly rooms: Set<Room>;
  readonly handshake: { readonly sessionStore?: unknown };
  readonly data: unknown;
  readonly acks: Map<number, unknown>;
  readonly client: { writeToEngine(parts: unknown[], flags: object): void; readonly conn: EngineConnection };
  /** The private id of its session, with connection state recovery. */
  readonly pid?: string;
  _onclose(reason: string): void;
  /** From Socket.IO 4.5 on. */
  listenersAnyOutgoing?(): unknown[];
  notifyOutgoingListeners?(packet: Packet): void;
}
export interface Packet {
  type: number;
  nsp: string;
  data: unknown[];
  id?: number;
}

/** The Socket.IO protocol's type of an event, https://socket.io/docs/v4/socket-io-protocol/#packet-types */
const EVENT = 2;
const ACK = 3;
const EVERYONE: BroadcastOptions = { rooms: new Set() };
/** Names that Socket.IO keeps for itself: a client's parser refuses the packet and closes its connection. */
const RESERVED_EVENTS = /^(connect|connect_error|disconnect|disconnecting|newListener|removeListener)$/;
/** Reserved for events between servers. */
const SERVER_EVENTS = /^(connect|connection|new_namespace)$/;

/** Packets for a room, or for options. */
type Target = string | BroadcastOptions;

/** Encoded packets for sockets: of a peer's frame, with how many stand before them in it, or a single one that was encoded here. */
type Delivery = { readonly sockets: Socket[]; packets(): unknown[][] } & (
  | { readonly target: Target; readonly frame: Frame; readonly first: number; readonly decoded?: undefined }
  | { readonly target: BroadcastOptions; readonly frame?: undefined; readonly origin: Origin; readonly decoded: Packet }
);

/** Binds what the rooms of a namespace and its sessions want. */
class BoundAdapter extends Adapter {
  declare readonly nsp: OpenNamespace;
  /** @internal Marks an adapter of any copy of this module: `bun --hot` evaluates it again, with a class of its own. */
  readonly "socket.io-amqp0": true = true;
  /** @internal The routing key of what is for everyone in this namespace. */
  readonly key: string;
  protected readonly node: Node;
  protected readonly routes: Routes;
  /** Where the server has `connectionStateRecovery`. */
  protected readonly recovery: Recovery | undefined;
  /** @internal Its rooms, and those that its sessions wait for, by the routing key of their packets. */
  readonly roomsByKey: Map<string, Room[]> = new Map();

  constructor(nsp: Namespace, node: Node) {
    super(nsp);
    this.key = namespaceKey(nsp.name);
    this.node = node;
    this.routes = node.routes(nsp.name);
    const { maxDisconnectionDuration } = this.nsp.server.opts?.connectionStateRecovery ?? {};
    if (maxDisconnectionDuration !== undefined)
      this.recovery = new Recovery(node, this.nsp, maxDisconnectionDuration, this.rooms, this.#follow);
  }

  /** Resolves once every later emit anywhere reaches the socket; it does not wait for a broker that is known to be away. */
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
    this.recovery?.sessions.left(id, this.nsp.sockets.get(id)?.pid);
    super.delAll(id);
    if (rooms) void this.#follow(rooms);
  }

  override persistSession(session: SocketSession): void {
    this.recovery?.sessions.persist(session);
  }

  /** Rejects where there is no session, which Socket.IO takes for a new client. */
  override restoreSession(pid: string, offset: string): Promise<Restored> {
    if (!this.recovery) return Promise.reject(new Error("connectionStateRecovery is off"));
    // Any client may present anything, and the other servers are asked for it.
    if (!isSocketId(pid) || !OFFSET.test(offset)) return Promise.reject(new Error("No such session"));
    return this.recovery.restore(pid, offset);
  }

  /**
   * A client that is connected hears what other servers emit from then on: until the namespace is bound, its connection is
   * held back, for a second at most, and not at all while the broker is away. There is no hook for it: a middleware would be
   * lost where a namespace is made from a pattern, so this one place wraps methods of Socket.IO's namespace.
   */
  protected holdClients(): void {
    const { nsp } = this;
    const { run, sockets, _preConnectSockets: coming = new Map<SocketId, unknown>(), _remove: remove } = nsp;
    nsp.run = (socket, next) => {
      const live = nsp.adapter === this ? this.node.receiver.follow(this.key) : undefined;
      if (!live) return run.call(nsp, socket, next);
      void within(1_000, live).then(() => run.call(nsp, socket, next));
    };
    // With `cleanupEmptyChildNamespaces`, Socket.IO closes a namespace when a client goes and no other is connected, even if
    // others are held back, or may come back. Here it stays open until nobody is held back and no session waits.
    if (!Object.hasOwn(nsp, "_remove")) return;
    nsp._remove = (socket) => {
      void (sockets.delete(socket.id) || coming.delete(socket.id));
      if (coming.size === 0 && !this.recovery?.keepsOpen) remove.call(nsp, socket);
    };
  }

  readonly #follow: Follow = (rooms) => {
    const pending: Promise<void>[] = [];
    for (const room of rooms) {
      if (!this.routes.hasKey(room)) continue;
      const key = roomKey(this.nsp.name, room);
      const isWanted = this.rooms.has(room) || this.recovery?.sessions.pinned.has(room);
      // Several rooms where users pass numbers: Socket.IO tells 1 from "1".
      const others = this.roomsByKey.get(key)?.filter((other) => other !== room) ?? [];
      if (isWanted) this.roomsByKey.set(key, [room, ...others]);
      else if (others.length > 0) this.roomsByKey.set(key, others);
      else this.roomsByKey.delete(key);
      const live = this.node.receiver.follow(key);
      if (live) pending.push(live);
    }
    return pending.length > 0 ? Promise.all(pending).then(() => {}) : undefined;
  };
}

/** The local side of a namespace: its sockets, what is written to them, and what peers ask of them. */
class LocalAdapter extends BoundAdapter {
  /** Connections that were found writable in this turn of the event loop. */
  readonly #writable = new Set<EngineConnection>();

  /** @internal Packets of a peer, handed to the local sockets as they are. */
  onPackets(section: Section, frame: Frame): void {
    const target = targetOf(section);
    const packets = () => takePackets(section);
    this.#write({ sockets: this.localSockets(target), target, frame, first: section.first, packets });
  }

  protected encoded(packet: Packet): unknown[] {
    packet.nsp = this.nsp.name;
    return this.nsp.server.encoder.encode(packet);
  }

  /** Delivers a packet, here encoded, to the local sockets. */
  protected writeLocally(decoded: Packet, parts: unknown[], opts: BroadcastOptions, origin: Origin): void {
    const packets = () => [parts];
    this.#write({ sockets: this.localSockets(opts), target: opts, origin, packets, decoded });
  }

  #write(delivery: Delivery): void {
    const { sockets, target, packets, decoded } = delivery;
    if (sockets.length === 0 && !this.recovery?.sessions.awaits(target)) return;
    const { volatile, compress } = (typeof target === "string" ? undefined : target.flags) ?? {};
    const isRemote = (delivery.frame ?? delivery.origin).sender !== this.node.uid;
    const options = { preEncoded: true, volatile: volatile && !isRemote, compress };
    for (const parts of this.recovery ? this.recovery.stamped(delivery) : packets()) {
      let packet = decoded;
      for (const socket of sockets) {
        if (socket.listenersAnyOutgoing?.().length) {
          try {
            socket.notifyOutgoingListeners?.((packet ??= decode(this.nsp, parts)));
          } catch (error) {
            if (!isRemote) throw error; // into the emit() of the user who can mend it
            this.node.reports.report(
              new Error(`An outgoing listener threw: ${asError(error).message}`, { cause: error }),
            );
          }
        }
        if (!volatile || !isRemote || this.#takesVolatile(socket.client.conn))
          socket.client.writeToEngine(parts, options);
      }
    }
  }

  /** One frame may bring packets of several turns: of the volatile ones Socket.IO would drop all but the first. */
  #takesVolatile(conn: EngineConnection): boolean {
    if (this.#writable.has(conn)) return true;
    if (!conn.transport.writable) return false;
    if (this.#writable.size === 0) queueMicrotask(() => this.#writable.clear());
    this.#writable.add(conn);
    return true;
  }

  protected localSockets(target: Target): Socket[] {
    const sockets: Socket[] = [];
    if (typeof target !== "string" && (target.rooms.size !== 1 || target.except?.size)) {
      // The one place that reaches for a private method: only `apply` knows how `rooms` and `except` pick local sockets.
      this["apply"](target, (socket: Socket) => sockets.push(socket));
      return sockets;
    }
    // The same for one room, with nothing made where nobody is in it: the most frequent case by far.
    const room = typeof target === "string" ? target : (target.rooms.values().next().value as Room);
    for (const id of this.rooms.get(room) ?? []) {
      const socket = this.nsp.sockets.get(id);
      if (socket) sockets.push(socket);
    }
    return sockets;
  }

  /** An acknowledged broadcast of a peer. Socket.IO's own asks no more clients once an outgoing listener throws. */
  protected answerBroadcast(message: Message & { type: "broadcast" }, from: string): void {
    const { id } = message;
    const target = fromWire(message.opts);
    const sockets = this.localSockets(target);
    const data = eventOf(decode(this.nsp, message.packet).data);
    const packet = { type: EVENT, nsp: this.nsp.name, id: this.nsp._ids++, data };
    const packets = () => [this.nsp.server.encoder.encode(packet)];
    const onAck = (...values: unknown[]) => this.answer(from, { type: "ack", id, packet: this.tryEncode(ACK, values) });
    this.answer(from, { type: "clients", id, count: sockets.length });
    for (const { acks } of sockets) acks.set(packet.id, onAck);
    // Socket.IO would keep these callbacks until the clients disconnect. An answer may be a second late.
    const keptMs = Math.min(message.timeout, MAX_TIMEOUT - 1_000) + 1_000;
    setTimeout(() => {
      for (const { acks } of sockets) acks.delete(packet.id);
    }, keptMs).unref();
    this.#write({ sockets, target, origin: FOREIGN, packets, decoded: packet });
  }

  /** Answers with a list, in parts of a bounded size. */
  protected answerList(id: string, list: readonly unknown[], to: string): void {
    let items: unknown[] = [];
    let size = 0;
    for (const item of list) {
      const itemSize = lengthOf(item);
      if (size > 0 && size + itemSize > this.node.settings.maxPayload / 4) {
        if (!this.answer(to, { type: "items", id, items, more: true })) return;
        items = [];
        size = 0;
      }
      items.push(item);
      size += itemSize;
    }
    this.answer(to, { type: "items", id, items, more: false });
  }

  /** Undefined where the parser does not take it. */
  protected tryEncode(type: number, data: unknown[]): Part[] | undefined {
    const packet = { type, nsp: this.nsp.name, id: 0, data };
    const encode = () => this.nsp.server.encoder.encode(packet).map(partOf);
    return this.tryTo("A packet cannot be encoded for other servers", encode);
  }

  /**
   * Returns false where the answer cannot be encoded or is too large: one without a value, which ends a list, goes in its place.
   */
  protected answer(to: string, value: Answer): boolean {
    const parts = this.tryTo("An answer cannot be sent to another server", () => encodeValue(value));
    const direct = this.routes.direct(to);
    if (parts && this.node.sender.add(direct, parts)) return true;
    this.node.sender.add(direct, encodeValue({ ...value, value: null, packet: undefined, items: [], more: false }));
    return false;
  }

  /** Undefined, and reported, where that throws. */
  protected tryTo<T>(what: string, convert: () => T): T | undefined {
    try {
      return convert();
    } catch (error) {
      this.node.reports.report(new TypeError(`${what}: ${asError(error).message}`));
      return undefined;
    }
  }

  /** @internal */
  onConnection(event: "connect" | "disconnect", connection: string): void {
    queueMicrotask(() => this.emit(event, connection));
  }

  /** @internal */
  report(error: Error): boolean {
    if (this.listenerCount("error") === 0) return false;
    // A listener that throws breaks nothing that is being done; one that is there once may have gone meanwhile.
    queueMicrotask(() => this.listenerCount("error") > 0 && this.emit("error", error));
    return true;
  }
}

/**
 * One namespace of one server. It emits `error` (an `Error`) for what a user should know, where somebody listens: a lost
 * connection, a refused permission, a message that could not be sent or read.
 */
export class AmqpAdapter extends LocalAdapter implements Tenant {
  /** @internal */
  readonly opened: PromiseWithResolvers<void> = Promise.withResolvers<void>();
  /** @internal */
  closing: Promise<void> | undefined;

  /** Made by what `createAdapter()` returns. */
  constructor(nsp: Namespace, node: Node) {
    super(nsp, node);
    this.ready.catch(() => this.close()); // rejects on close(), which nobody has to await, or where the server is closed
    const { adapter: replaced } = this.nsp;
    // Not in init(), which Socket.IO calls from 4.8.2 on only, and before a namespace that is made from a pattern is complete.
    queueMicrotask(() => {
      node.join(this);
      this.holdClients();
      if (replaced?.["socket.io-amqp0"]) void replaced.close(); // Socket.IO does not
    });
  }

  /** Resolves once connected and bound, and the other servers are known; rejects if the adapter is closed before. */
  get ready(): Promise<void> {
    return this.opened.promise;
  }

  get stats(): AdapterStats {
    const stats = { ...this.node.stats, rooms: this.node.receiver.countBound(this.roomsByKey.keys()) };
    return Object.defineProperty(stats, Symbol.for("nodejs.util.inspect.custom"), {
      value: () => describeStats(stats),
    });
  }

  /** This server's name in the cluster. */
  get uid(): string {
    return this.node.uid;
  }

  /** Resolves once the adapter is ready. Socket.IO calls it; calling it again does no harm. */
  override init(): Promise<void> {
    return this.ready;
  }

  override close(): Promise<void> {
    return (this.closing ??= Promise.resolve(this.recovery?.close()).then(() => this.node.leave(this)));
  }

  override serverCount(): Promise<number> {
    return Promise.resolve(1 + this.#peers.length);
  }

  /** The other servers that have this namespace open. */
  get #peers(): string[] {
    return this.closing ? [] : this.node.membership.serversOf(this.nsp.name);
  }

  override broadcast(packet: Packet, opts: BroadcastOptions): void {
    const parts = this.encoded(packet);
    try {
      this.writeLocally(packet, parts, opts, { sender: this.uid, number: 0 });
    } finally {
      // Also if an outgoing listener throws. A packet with an id is from `socket.emit()` with a callback: its client answers.
      if (packet.id === undefined && !opts.flags?.local && !this.node.closing)
        this.node.sender.add(this.routes.packets(opts), parts);
    }
  }

  override broadcastWithAck(
    packet: Packet,
    opts: BroadcastOptions,
    clientCountCallback: (clientCount: number) => void,
    ack: (...args: unknown[]) => void,
  ): void {
    const peers = this.#peers;
    const parts = opts.flags?.local ? undefined : this.tryEncode(EVENT, packet.data);
    if (!parts)
      for (const _ of peers) clientCountCallback(0); // the caller waits for one count per server
    else {
      // A peer is counted when the last of its clients has answered or when it is gone, so a dead one is not waited for.
      const clients = new Map(peers.map((uid) => [uid, { count: Infinity, acks: 0 }]));
      const timeout = opts.flags?.timeout ?? this.node.settings.requestsTimeout;
      const question = (id: string): Message => ({ type: "broadcast", id, opts: toWire(opts), timeout, packet: parts });
      const answers: Answers = {
        take: (message, uid) => {
          const peer = clients.get(uid);
          if (!peer) return false;
          if (message.type === "clients") peer.count = message.count;
          if (message.type === "ack") {
            peer.acks++;
            const { packet } = message;
            const answer = packet && this.tryTo("A client's answer cannot be read", () => decode(this.nsp, packet));
            const unsendable = "The client's answer cannot be sent to this server; one of the servers has reported why";
            queueMicrotask(() => ack(...(answer?.data ?? [new Error(unsendable)]))); // deferred as below
          }
          return peer.acks >= peer.count;
        },
        // Deferred, because this runs a user callback that may throw.
        done: (uid) => queueMicrotask(() => clientCountCallback(clients.get(uid)?.acks ?? 0)),
      };
      void this.#ask("broadcastWithAck", question, answers, opts.flags);
    }
    super.broadcastWithAck(packet, opts, clientCountCallback, ack);
  }

  override addSockets(opts: BroadcastOptions, rooms: Room[]): void {
    super.addSockets(opts, rooms);
    if (opts.flags?.local) return;
    this.routes.joinFromAfar(rooms);
    this.#send({ type: "join", opts: toWire(opts), rooms });
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
    const sockets: unknown[] = this.localSockets(opts);
    const question = (id: string): Message => ({ type: "fetch", id, opts: toWire(opts) });
    const answers = takingLists((list) => list.forEach((socket) => sockets.push(socket)));
    const late = await this.#ask("fetchSockets", question, answers, opts.flags);
    if (late) throw late;
    return sockets;
  }

  /** What the deprecated `io.allSockets()` gives. */
  override async sockets(rooms: Set<Room>): Promise<Set<SocketId>> {
    const sockets = await this.fetchSockets({ rooms });
    return new Set(sockets.map((socket) => (socket as Pick<Socket, "id">).id));
  }

  override serverSideEmit(args: unknown[]): void {
    const callback = args.at(-1);
    if (typeof callback !== "function") return this.#send({ type: "emit", id: undefined, args });
    const values: unknown[] = [];
    const question = (id: string): Message => ({ type: "emit", id, args: args.slice(0, -1) });
    const take = (message: Answer) => message.type === "answer" && values.push(message.value) > 0;
    // Deferred: what the callback throws must not reject this promise.
    const done = (late: Error | null) => queueMicrotask(() => callback(late, values));
    void this.#ask("serverSideEmit", question, { take }).then(done);
  }

  /** Asks the other servers. Resolves with an error if some have not answered in time. */
  #ask(method: string, question: (id: string) => Message, answers: Answers, flags: BroadcastFlags = {}) {
    const peers = flags.local ? [] : this.#peers;
    const timeout = flags.timeout ?? this.node.settings.requestsTimeout;
    const asked = this.node.requests.ask(this.nsp.name, peers, timeout, (id) => this.#send(question(id)), answers);
    const late = (count: number) => new Error(`${method}: ${count} of ${peers.length} servers did not answer in time`);
    return asked.then((unanswered) => (unanswered > 0 ? late(unanswered) : null));
  }

  #send(message: Message): void {
    if (!this.node.closing) this.node.sender.add(this.routes.message(message), encodeValue(message));
  }

  /** @internal A message of a peer, an emitter or a foreign client. */
  onMessage(message: Message, { sender: from, number }: Origin): void {
    switch (message.type) {
      case "packet": {
        const packet = { type: EVENT, nsp: this.nsp.name, data: eventOf(message.data) };
        return this.writeLocally(packet, this.encoded(packet), fromWire(message.opts), { sender: from, number });
      }
      case "join":
        return super.addSockets(fromWire(message.opts), sentRooms(message.rooms));
      case "leave":
        return super.delSockets(fromWire(message.opts), message.rooms);
      case "disconnect":
        return super.disconnectSockets(fromWire(message.opts), message.close);
      case "emit": {
        const { id, args } = message;
        if (id === undefined) return this.nsp._onServerSideEmit(args);
        // Of what the listeners answer, the peer takes the first.
        const onAnswer = (value: unknown) => this.answer(from, { type: "answer", id, value });
        return this.nsp._onServerSideEmit([...args, onAnswer]);
      }
      case "fetch": {
        const { settings, reports } = this.node;
        const details = (socket: Socket) => detailsOf(socket, settings.maxPayload / 4, reports.report);
        return this.answerList(message.id, this.localSockets(fromWire(message.opts)).map(details), from);
      }
      case "broadcast":
        return this.answerBroadcast(message, from);
      case "find":
      case "claim":
      case "offer":
        if (!this.recovery) return this.answerList(message.id, [], from);
        return void this.recovery.onMessage(message, from, (list) => this.answerList(message.id, list, from));
      default:
        this.node.requests.onAnswer(message, from);
    }
  }
}

/** What a parser makes of an event; undefined where it takes only some, or encodes each time in another way. */
function sampleOf(encoder: Encoder): string | undefined {
  const encode = () => encoder.encode({ type: EVENT, nsp: "/", data: ["name"] }).join();
  try {
    const sample = encode();
    return sample === encode() ? sample : undefined;
  } catch {
    return undefined;
  }
}

const targetOf = ({ kind, head }: Section): Target =>
  kind === SectionKind.Room ? head : kind === SectionKind.Options ? parseHead(head) : EVERYONE;

function decode({ server }: OpenNamespace, parts: readonly unknown[]): Packet {
  const decoder = new server._parser.Decoder({ maxAttachments: Infinity });
  let packet: Packet | undefined;
  decoder.on("decoded", (decoded) => (packet = decoded));
  for (const part of parts) decoder.add(part);
  decoder.destroy();
  if (!packet) throw new FrameError(`a packet of ${parts.length} parts that the parser does not understand`);
  return packet;
}

type ListTaker = (list: unknown[], from: string, isLast: boolean) => void;
/** For a question that each peer answers with a list, in parts. */
const takingLists = (take: ListTaker): Answers => ({
  take: (message, from) => {
    if (message.type !== "items") return false;
    take(message.items, from, !message.more);
    return !message.more;
  },
});

/** A socket as peers see it, in at most `max` bytes. Values that cannot be sent are left out, and reported by their keys. */
function detailsOf({ id, handshake, rooms, data }: Socket, max: number, report: (error: Error) => void): unknown {
  const { sessionStore: _, ...rest } = handshake; // may hold circular references
  const details = { id, handshake: rest, rooms: [...rooms], data };
  if (lengthOf(details) <= max) return details;
  const left: string[] = [];
  const sendable = (name: string, value: unknown): unknown => {
    if (lengthOf(value) <= max / 2) return value;
    if (!isRecord(value)) left.push(name);
    const entries = isRecord(value) ? Object.entries(value) : [];
    const kept = Object.fromEntries(entries.filter(([, part]) => lengthOf(part) <= max / 2));
    const fitting = lengthOf(kept) <= max / 2 ? kept : {};
    left.push(...entries.filter(([key]) => !(key in fitting)).map(([key]) => `${name}.${key}`));
    return fitting;
  };
  const sent = { id, handshake: sendable("handshake", rest), rooms: [...rooms], data: sendable("data", data) };
  const what = `${left.join(", ")} cannot be sent to another server: not JSON, or over ${max / 2} bytes together`;
  report(new Error(`Of socket '${id}', ${what}`));
  return { ...sent, handshake: { headers: {}, query: {}, auth: {}, ...(sent.handshake as object) } };
}

/** How many bytes of JSON and binary a value takes; Infinity for one that cannot be encoded. */
function lengthOf(value: unknown): number {
  try {
    return encodeValue(value).reduce((sum, part) => sum + Buffer.byteLength(part), 0);
  } catch {
    return Infinity;
  }
}

/** An event from elsewhere, or a FrameError where the clients' parsers would refuse it and drop their connections. */
function eventOf(data: unknown[]): unknown[] {
  if (typeof data[0] === "string" && !RESERVED_EVENTS.test(data[0])) return data;
  throw new FrameError(`an event named ${JSON.stringify(data[0])}; expected a string that is not reserved`);
}

// ── Recovery: sessions of clients that lost their connection, kept until they come back to any server ────────────────

/** What Socket.IO hands over when a client is lost, and takes back when it returns: `pid` is the client's private id. */
type SocketSession = Readonly<Omit<Restored, "missedPackets">>;

/** A packet that was delivered in a namespace, and to whom. */
interface Delivered extends Origin {
  /** Its server's position just after it. */
  readonly position: number;
  /** Everyone, if there are no rooms. */
  readonly rooms: readonly Room[];
  readonly except: readonly Room[];
  readonly parts: readonly Part[];
}

/** The same, for one client that missed it. */
type Missed = Pick<Delivered, "parts">;

/** How far a client has come, in positions of the server that it is or was connected to. */
interface Trail {
  readonly sid: SocketId;
  /** That server, whose offsets the client knows. */
  readonly owner: string;
  /** The position at which the client came, and that of the last packet that was written to it. */
  readonly base: number;
  last: number;
  /** The offset with which it came back, if it did. Until it hears of a newer one, this stands for `base`. */
  readonly presented?: string | undefined;
  /** When it came (ms, monotonic). */
  readonly cameAt: number;
  /** What it had missed on other servers then: each takes one of the positions after `base`. */
  readonly missed: readonly Missed[];
  /** What was delivered after that, here and, before a session was handed over, by its former server. */
  readonly history: History;
}

/** A session that waits for its client. */
interface Session extends SocketSession, Trail {
  /** The owner's position when the client was lost. */
  readonly lostAt: number;
  /** The position of the latest packet for it that its former servers no longer had. */
  readonly gone: number;
  /** Until when it waits (ms, monotonic). */
  readonly until: number;
}
/** The same as one server hands it over to another: it waits for so many ms yet. */
type HandedSession = Omit<Session, "until" | "cameAt" | "missed" | "history"> & { readonly ms: number };
/** One that another server hands over. `isMoving`: it is still on its way to that server, which is asked again. */
type MovingSession = Pick<Session, "pid" | "rooms"> & { readonly isMoving?: true };
/** Sessions and packets of one group have the same history. */
type InGroup = { readonly group: number };
/** What follows `isHeard` in the answer to a claim: sessions, what a client had missed elsewhere, what was delivered for a group. */
type HandedItem = (HandedSession & InGroup) | (Missed & { readonly of: string }) | (Delivered & InGroup);

/** What was delivered, in positions of the owner of sessions, which many of them share. */
interface History {
  /** What was delivered after a position for any of these rooms, or for everyone. */
  after(position: number, rooms: ReadonlySet<Room>): Delivered[];
  /** The position of the latest packet for these rooms that is no longer there. */
  gone(rooms: readonly Room[]): number;
}

/** Binds or unbinds rooms as they are wanted; resolves when all that are wanted are live. */
type Follow = (rooms: Iterable<Room>) => Promise<void> | void;

/** A server's name and a position. */
const OFFSET = /^[\w-]{8}\.\d{1,16}$/;
/** For how many ms a connection may have been dead before its client is known to be lost, and some more. */
const unnoticedMs = ({ pingInterval = 25_000, pingTimeout = 20_000 }: ServerOptions = {}): number =>
  pingInterval + pingTimeout + 15_000;
/** A position after all others. */
const LAST = Number.MAX_SAFE_INTEGER;

/** What a server has delivered in a namespace, as frames: copies of peers' frames, with the position in place of the floor. */
class DeliveryLog implements History {
  /** How many packets there were. */
  position = 0;
  readonly #maxBytes: number;
  readonly #frames: FrameLog;
  /** The peer's frame that came last, and the position before it. */
  #noted: Frame | undefined;
  #base = 0;
  /** Packets that did not come in a frame and are in none of this log yet, their bytes, and the one origin of all of them. */
  #loose: Pick<Waiting, "to" | "parts">[] = [];
  #looseBytes = 0;
  #origin: Origin = FOREIGN;
  /** Per room, and for everyone: the highest position that is no longer in the log. */
  readonly #gone = new Map<Room, number>();
  #goneForAll = 0;

  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes;
    this.#frames = new FrameLog(maxBytes);
  }

  /** Keeps a peer's frame; gives the position before its first packet. */
  note(frame: Frame): number {
    if (frame === this.#noted) return this.#base;
    this.#flush();
    this.#noted = frame;
    this.#base = this.position;
    const body = this.#allocate(frame.body.length);
    frame.body.copy(body);
    body.writeUIntLE(this.position, FLOOR, 6);
    this.position += frame.packets;
    return this.#base;
  }

  /** Keeps a packet that came in no frame of its own; gives its position. */
  add(to: Destination, parts: readonly Part[], origin: Origin): number {
    if (origin.number !== this.#origin.number || origin.sender !== this.#origin.sender) this.#flush();
    this.#origin = origin;
    let bytes = to.head.length;
    for (const part of parts) bytes += part.length;
    this.#loose.push({ to, parts });
    this.#looseBytes += bytes;
    this.position++;
    if (this.#looseBytes > Math.min(FRAME_SIZE, this.#maxBytes / 16)) this.#flush();
    return this.position;
  }

  /** Reserves positions for packets that are kept elsewhere; gives the position before them. */
  skip(count: number): number {
    this.#flush();
    this.position += count;
    return this.position - count;
  }

  gone(rooms: readonly Room[]): number {
    return rooms.reduce((latest: number, room) => Math.max(latest, this.#gone.get(room) ?? 0), this.#goneForAll);
  }

  after(position: number, rooms: ReadonlySet<Room>): Delivered[] {
    this.#flush();
    const frames = this.#frames;
    let number = frames.next - 1;
    while (number > frames.first && this.#read(number).floor > position) number--;
    const found: Delivered[] = [];
    for (number = Math.max(number, frames.first); number < frames.next; number++) {
      const frame = this.#read(number);
      const { sender, floor } = frame;
      for (const section of readSections(frame).sections) {
        const to = recipientsOf(section);
        if (!to || !isForSome(rooms, to)) continue;
        for (const [i, packet] of takePackets(section).entries()) {
          const at = floor + section.first + i + 1;
          if (at <= position) continue;
          const parts = packet.map(partOf); // copies binaries: the log's memory is used again
          found.push({ position: at, ...to, parts, sender, number: frame.number });
        }
      }
    }
    return found;
  }

  /** Forgets what was delivered before a time, and rooms that nobody is in: whoever joins one has missed nothing there. */
  expire(before: number, isUsed: (room: Room) => boolean): void {
    while ((this.#frames.timeOf(this.#frames.first) ?? before) < before) this.#forget();
    for (const room of this.#gone.keys()) if (!isUsed(room)) this.#gone.delete(room);
  }

  #flush(): void {
    if (this.#loose.length === 0) return;
    const { sender, number } = this.#origin;
    const base = this.position - this.#loose.length;
    writeFrame((size) => this.#allocate(size), sender, number, base, this.#loose, []);
    this.#loose = [];
    this.#looseBytes = 0;
  }

  #allocate(size: number): Buffer {
    while (this.#frames.bytes + size > this.#maxBytes && this.#frames.first < this.#frames.next) this.#forget();
    return this.#frames.append(size, performance.now(), 0);
  }

  #forget(): void {
    const frame = this.#read(this.#frames.first);
    const { sections } = readSections(frame);
    for (const [i, section] of sections.entries()) {
      const position = frame.floor + (sections[i + 1]?.first ?? frame.packets);
      const to = recipientsOf(section);
      if (to?.rooms.length === 0) this.#goneForAll = position;
      for (const room of to?.rooms ?? []) this.#gone.set(this.#gone.has(room) ? room : detached(room), position);
    }
    this.#frames.forget();
  }

  #read(number: number): Frame {
    return readFrame(this.#frames.get(number)!);
  }
}

/** Who the packets of a section are for; undefined where that cannot be read, which was reported when they were delivered. */
function recipientsOf(section: Section): Pick<Delivered, "rooms" | "except"> | undefined {
  try {
    const target = targetOf(section);
    if (typeof target === "string") return { rooms: [target], except: [] };
    return { rooms: [...target.rooms], except: [...(target.except ?? [])] };
  } catch {
    return undefined;
  }
}

/** Whether packets are for some of these rooms. */
const isForSome = (rooms: ReadonlySet<Room>, to: Pick<Delivered, "rooms">): boolean =>
  to.rooms.length === 0 || to.rooms.some((room) => rooms.has(room));

/** The sessions of a namespace that wait on this server, and what their clients have missed. No I/O. */
class Sessions {
  readonly log: DeliveryLog;
  /** Rooms that stay bound though nobody may be in them, and for how many sessions. */
  readonly pinned: Map<Room, number> = new Map();
  readonly follow: Follow;
  /** Called when the last session has gone. */
  readonly #emptied: () => void;
  readonly #uid: string;
  readonly #maxMs: number;
  readonly #unnoticedMs: number;
  /** By private id: those that wait here, or move. */
  readonly #kept = new Map<string, Session | MovingSession>();
  /** Sessions whose clients are about to be connected, and what these have presented. */
  readonly #arriving = new Map<SocketId, { readonly session: Session; readonly offset: string }>();
  /** By private id: of clients that are connected. */
  readonly #trails = new Map<string, Trail>();

  constructor(uid: string, maxBytes: number, maxMs: number, unnoticedMs: number, follow: Follow, emptied: () => void) {
    this.#uid = uid;
    this.#maxMs = Math.min(maxMs, LAST); // JSON has no Infinity
    this.#unnoticedMs = unnoticedMs;
    this.follow = follow;
    this.#emptied = emptied;
    this.log = new DeliveryLog(maxBytes);
  }

  /** How many there are, with those that move. */
  get size(): number {
    return this.#kept.size;
  }

  get waiting(): Session[] {
    return [...this.#kept.values()].filter(this.#isWaiting);
  }

  /** Whether a session is being handed over to this server, or its client is being connected here. */
  isMoving(pid: string): boolean {
    const session = this.#kept.get(pid);
    return session !== undefined && !this.#isWaiting(session);
  }

  /** A session that waits. With an offset only if that is known, and what was missed after it. */
  find(pid: string, offset?: string): Session | undefined {
    const session = this.#kept.get(pid);
    if (!session || !this.#isWaiting(session) || session.until <= performance.now()) return undefined;
    return offset === undefined || missedSince(session, offset) !== undefined ? session : undefined;
  }

  /** From here on the rooms of a session stay bound. */
  keep(session: Session | MovingSession): void {
    const before = this.#kept.get(session.pid);
    this.#kept.set(session.pid, session);
    for (const room of session.rooms) this.pinned.set(room, (this.pinned.get(room) ?? 0) + 1);
    if (before) this.#unpin(before.rooms);
  }

  /** Removes a session that has left or did not arrive; a newer one of the same client stays. */
  drop(session: Session | MovingSession): void {
    if (this.#kept.get(session.pid) !== session) return;
    this.#kept.delete(session.pid);
    this.#unpin(session.rooms);
    if (this.#kept.size === 0) this.#emptied();
  }

  /** Whether packets for a room or options are kept though there is no socket for them. */
  awaits(target: Target): boolean {
    if (typeof target === "string") return this.pinned.has(target);
    return this.pinned.size > 0 && (target.rooms.size === 0 || [...target.rooms].some((room) => this.pinned.has(room)));
  }

  /** Notes that a packet is written to sockets; gives its offset. */
  wrote(sockets: readonly Pick<Socket, "pid">[], position: number): string {
    for (const { pid = "" } of sockets) {
      const trail = this.#trails.get(pid);
      if (trail) trail.last = position;
    }
    return `${this.#uid}.${position}`;
  }

  /** The trail of a connected client that may present an offset. */
  trailOf(pid: string, offset: string): Trail | undefined {
    const trail = this.#trails.get(pid);
    return trail && positionOf(offset, trail) !== undefined ? trail : undefined;
  }

  /** The client of a session that was found is about to be connected. */
  arrive(session: Session, offset: string): void {
    this.#arriving.set(session.sid, { session, offset });
  }

  /** A socket is connected: gives what its client has missed; undefined where that is not known any more. */
  connected({ id: sid, pid = "" }: Socket): Pick<Delivered, "parts" | "position">[] | undefined {
    const { log } = this;
    const arrival = this.#arriving.get(sid);
    const trail = { sid, owner: this.#uid, cameAt: performance.now(), history: log };
    if (!arrival) {
      this.#trails.set(pid, { ...trail, base: log.position, last: log.position, missed: [] });
      return [];
    }
    const { session, offset } = arrival;
    this.#arriving.delete(sid);
    if (this.#kept.get(session.pid) !== session) return undefined; // its time was over
    this.drop(session);
    const since = missedSince(session, offset);
    if (since === undefined) return undefined;
    const rooms = new Set(session.rooms);
    const later = session.history.after(since, rooms).filter(({ except }) => !except.some((room) => rooms.has(room)));
    const isOwn = session.history === log;
    const unread = session.missed.slice(since - session.base);
    // What was delivered elsewhere has positions here, but no place in the log: many clients may have missed the same.
    const missed = isOwn ? unread : [...unread, ...later];
    const base = isOwn ? since : log.skip(missed.length);
    this.#trails.set(pid, { ...trail, presented: offset, base, last: base, missed });
    return [...missed.map(({ parts }, i) => ({ parts, position: base + i + 1 })), ...(isOwn ? later : [])];
  }

  /** A socket has gone. One that was never connected leaves its session as it found it. */
  left(sid: SocketId, pid = ""): void {
    const arrival = this.#arriving.get(sid);
    this.#arriving.delete(sid);
    if (arrival) this.keep(arrival.session);
    this.#trails.delete(pid);
  }

  /** A client is lost. */
  persist(session: SocketSession): void {
    const trail = this.#trails.get(session.pid);
    const lost = { lostAt: this.log.position, gone: 0, until: performance.now() + this.#maxMs };
    if (trail) this.keep({ ...session, ...trail, ...lost });
  }

  /** Gives sessions away, with what their clients have missed after an offset, or after whatever they may present. */
  giveAway(pids: readonly string[], offset: string | undefined, isSendable: (item: object) => boolean): HandedItem[] {
    const now = performance.now();
    const given = pids.flatMap((pid) => this.find(pid, offset) ?? []);
    for (const session of given) this.drop(session);
    return [...Map.groupBy(given, ({ history }) => history)].flatMap(([history, sessions], group) => {
      const begins = sessions.map((session) => (offset === undefined ? session.base : missedSince(session, offset)));
      const since = begins.reduce((first: number, begin = LAST) => Math.min(first, begin), LAST);
      const delivered = history.after(since, new Set(sessions.flatMap(({ rooms }) => rooms)));
      const large = new Set(delivered.filter((packet) => !isSendable(packet))); // those who missed one begin anew
      const sent = delivered.filter((packet) => !large.has(packet));
      const handed = sessions.map((session) => {
        const { missed: _, history: __, cameAt: ___, until, ...rest } = session;
        const rooms = new Set(session.rooms);
        const notSent = [...large].findLast((packet) => isForSome(rooms, packet))?.position ?? 0;
        return { ...rest, gone: Math.max(since, goneFor(session), notSent), ms: until - now, group };
      });
      const missed = sessions.flatMap(({ pid, missed }) => missed.map(({ parts }) => ({ of: pid, parts })));
      // The sessions last: none of them comes over without its packets.
      return [...missed, ...sent.map((packet) => ({ ...packet, group })), ...handed];
    });
  }

  /** Forgets sessions whose time is over, and what nobody can have missed any more. `rooms` are those that sockets are in. */
  expire(rooms: ReadonlyMap<Room, unknown>): void {
    const now = performance.now();
    const sessions = [...this.#kept.values()].filter((session) => "until" in session);
    for (const session of sessions) if (session.until < now) this.drop(session);
    const lostAt = sessions.reduce((first, { until }) => Math.min(first, until - this.#maxMs), now);
    this.log.expire(lostAt - this.#unnoticedMs, (room) => rooms.has(room) || this.pinned.has(room));
    for (const [pid, trail] of this.#trails) {
      const { cameAt, base, missed } = trail;
      if (missed.length === 0 || cameAt > now - this.#unnoticedMs) continue;
      // It has read what it had missed, or its connection would be known to be dead.
      this.#trails.set(pid, { ...trail, base: base + missed.length, presented: undefined, missed: [] });
    }
  }

  #unpin(rooms: readonly Room[]): void {
    for (const room of rooms) this.pinned.set(room, (this.pinned.get(room) ?? 0) - 1);
    const free = rooms.filter((room) => this.pinned.get(room) === 0);
    for (const room of free) this.pinned.delete(room);
    void this.follow(free);
  }

  readonly #isWaiting = (session: Session | MovingSession): session is Session =>
    "until" in session && !this.#arriving.has(session.sid);
}

/** What an offset, an owner's name and a position, stands for that the client may have; undefined for any other. */
function positionOf(offset: string, { owner, base, last, presented }: Trail): number | undefined {
  if (offset === presented) return base;
  const position = Number(offset.slice(owner.length + 1));
  const isGiven = offset === `${owner}.${position}` && position >= base && position <= last;
  return isGiven ? position : undefined;
}

/** After which position a client has missed packets, by the offset that it presents; undefined where they are not known. */
function missedSince(session: Session, offset: string): number | undefined {
  const position = positionOf(offset, session);
  // A client that has the last packet which was written to it has missed only what came after its loss.
  const since = position === session.last ? session.lostAt : position;
  return since !== undefined && since >= goneFor(session) ? since : undefined;
}

const goneFor = ({ gone, history, rooms }: Session): number => Math.max(gone, history.gone(rooms));

type RecoveryMessage = Extract<Message, { type: "find" | "claim" | "offer" }>;

/** How long until a server is asked again that is not ready to hand a session over, in ms. */
const ASK_LATER = 20;

/** Hands sessions over to other servers, and takes them over. */
class Handover {
  /** Whether this server closes. */
  isClosing = false;
  readonly #node: Node;
  readonly #routes: Routes;
  readonly #sessions: Sessions;

  constructor(node: Node, routes: Routes, sessions: Sessions) {
    this.#node = node;
    this.#routes = routes;
    this.#sessions = sessions;
  }

  /** Takes a session over from the server that lost the client, or from any other. Resolves with whether to ask again. */
  async search(pid: string, offset: string, until: number): Promise<boolean> {
    if (this.#sessions.isMoving(pid)) return true;
    const opened = this.#node.opened.promise.catch(() => {});
    await within(1_000, opened); // a server that starts knows no other
    const [owner] = offset.split(".");
    const peers = this.#peers();
    for (const asked of [peers.filter((uid) => uid === owner), peers.filter((uid) => uid !== owner)]) {
      if (this.isClosing || this.#sessions.find(pid)) break;
      if (await this.takeOver(asked, until, pid, offset)) return true;
    }
    return this.#sessions.isMoving(pid);
  }

  /** A peer asks for the session of a client that has come to it, or for all: gives those that it may claim. */
  onFind(pid: string | undefined, offset: string): MovingSession[] {
    if (pid !== undefined && this.#sessions.isMoving(pid)) return [{ pid, rooms: [], isMoving: true }];
    const found = pid === undefined ? this.#sessions.waiting : [this.#sessions.find(pid, offset) ?? []].flat();
    return found.flatMap((session) => {
      const { pid, sid, rooms, data } = session;
      if (this.#isSendable({ rooms, data })) return { pid, rooms };
      const message = `The data of socket '${sid}' cannot be sent to another server: its client begins anew there`;
      this.#node.reports.report(new TypeError(message));
      if (this.isClosing) this.#sessions.drop(session); // the others are offered without it
      return [];
    });
  }

  /** A peer claims sessions: they are its own from here on. Answered at once: what is emitted later must follow the answer. */
  onClaim(pids: readonly string[], offset: string | undefined): unknown[] {
    const heard = this.#node.membership.heard();
    if (!heard) return [];
    const items = this.#sessions.giveAway(pids, offset, this.#isSendable);
    return [{ heard, count: items.length }, ...items];
  }

  /** Hands all sessions over to other servers, as far as there is time. */
  async close(until: number): Promise<void> {
    this.isClosing = true;
    const refusing = new Set<string>();
    const offer = (id: string): Message => ({ type: "offer", id });
    while (this.#sessions.size > 0 && performance.now() < until) {
      const [session] = this.#sessions.waiting;
      const peer = this.#peers().find((uid) => !refusing.has(uid));
      if (!peer) break; // there is no other server, or all close as well
      // Half of the time for each: one that hangs must not take all of it.
      const now = performance.now();
      if (session) await this.#ask([peer], now + (until - now) / 2, offer, () => {});
      else await Bun.sleep(ASK_LATER); // some move
      if (session && this.#sessions.find(session.pid) === session) refusing.add(peer);
    }
  }

  /**
   * Takes sessions over that are found by `until`: binds their rooms, then claims them. The answer may take longer, for a session
   * that was claimed is nowhere else. Resolves with true where another server is taking them over just now, or was faster, so
   * that the caller asks again.
   *
   * Frames of one sender stay in order. So the answer holds what the peer has emitted, if that comes here before the answer,
   * and what this server has emitted, if that was before the claim. For each other sender the answer says up to which frame's
   * number it holds its packets.
   */
  async takeOver(peers: string[], until: number, pid?: string, offset?: string): Promise<boolean> {
    const sessions: MovingSession[] = [];
    let from = "";
    let isMoving = false;
    const find = (id: string): Message => ({ type: "find", id, pid, offset });
    const found = Promise.withResolvers<void>();
    const asked = this.#ask(peers, until, find, (list, uid, isLast) => {
      for (const session of list.filter(isMovingSession)) {
        if (session.isMoving) isMoving = true;
        else if (from === "" || from === uid) {
          from = uid;
          sessions.push(session);
        }
      }
      if (isLast && from === uid) found.resolve();
    });
    await Promise.race([asked, found.promise]); // the others may hang
    if (sessions.length === 0) return isMoving;
    const { membership, settings } = this.#node;
    const { log } = this.#sessions;
    const begin = log.position;
    for (const session of sessions) this.#sessions.keep(session);
    // The namespace too: a client may be in no room that has a key.
    const live = [
      this.#node.receiver.follow(namespaceKey(this.#routes.nsp)),
      this.#sessions.follow(sessions.flatMap(({ rooms }) => rooms)),
    ];
    const end = performance.now() + settings.journal.ms; // then the answer may be lost
    await within(settings.journal.ms, Promise.all(live));
    const pids = sessions.map(({ pid }) => pid);
    const claim = (id: string): Message => ({ type: "claim", id, pids, offset });
    let taken: Session[] | undefined;
    while (this.#peers().includes(from)) {
      const items: unknown[] = [];
      const claimedAt = log.position;
      const take: ListTaker = (list, _, isLast) => {
        for (const item of list) items.push(item); // as arguments they may be too many
        if (isLast) taken = this.#inherited(items, from, begin, claimedAt);
      };
      if (membership.heard()) await this.#ask([from], end, claim, take);
      if (taken || performance.now() > until) break;
      await Bun.sleep(ASK_LATER);
    }
    // What comes yet in a catch-up may be in the answer too, and a client that is connected would get it twice.
    while (!membership.heard() && !this.#node.closing && performance.now() < end) await Bun.sleep(ASK_LATER);
    for (const session of taken ?? []) this.#sessions.keep(session);
    for (const session of sessions) this.#sessions.drop(session);
    return !taken?.length; // claimed in vain: another server was faster
  }

  /** Reads the answer to a claim, if that server is ready. `begin` is the log's position before the rooms were bound. */
  #inherited(items: readonly unknown[], from: string, begin: number, claimedAt: number): Session[] | undefined {
    const [first] = items;
    if (!isHeard(first)) return undefined;
    const { heard, count } = first;
    if (items.length !== count + 1) return []; // some were lost on their way
    const { log } = this.#sessions;
    // That server's own packets, up to the answer.
    const covered = { ...heard, [from]: this.#node.membership.peers.get(from)?.stream.highest };
    const isLater = ({ sender, number, position }: Delivered) =>
      // Own ones and those of other AMQP clients have no number.
      number > 0 ? number > (covered[sender] ?? 0) : position > claimedAt;
    const now = performance.now();
    const inherited: Session[] = [];
    const missedBy = Map.groupBy(items.filter(isMissed), ({ of }) => of);
    const delivered = Map.groupBy(items.filter(isDelivered), ({ group }) => group);
    for (const [group, sessions] of Map.groupBy(items.filter(isHandedSession), ({ group }) => group)) {
      const came: Delivered[] = delivered.get(group) ?? [];
      const all = new Set(sessions.flatMap(({ rooms }) => rooms));
      let end = begin;
      const history: History = {
        after(since, rooms) {
          // What was delivered here meanwhile is read once for all of them.
          for (const packet of log.after(end, all)) if (isLater(packet)) came.push({ ...packet, position: LAST });
          end = log.position;
          return came.filter((packet) => packet.position > since && isForSome(rooms, packet));
        },
        gone: (rooms) => (log.gone(rooms) > end ? LAST : 0),
      };
      for (const { ms, ...session } of sessions)
        inherited.push({ ...session, cameAt: now, until: now + ms, missed: missedBy.get(session.pid) ?? [], history });
    }
    return inherited;
  }

  /** Whether a list with this item alone can be sent. */
  readonly #isSendable = (item: object): boolean => lengthOf(item) <= this.#node.settings.maxPayload - 2 * OVERHEAD;

  /** The other servers that have the namespace open; none while the broker is away, or when this server says goodbye. */
  #peers(): string[] {
    const { closing, upSince, membership } = this.#node;
    return closing || upSince === undefined ? [] : membership.serversOf(this.#routes.nsp);
  }

  /** Asks servers, each of which answers with a list, in parts. */
  #ask(peers: string[], until: number, question: (id: string) => Message, take: ListTaker): Promise<unknown> {
    const { sender, requests } = this.#node;
    const send = (id: string) => {
      const parts = encodeValue(question(id));
      for (const uid of peers) sender.add(this.#routes.direct(uid), parts);
    };
    return requests.ask(this.#routes.nsp, peers, Math.max(until - performance.now(), 0), send, takingLists(take));
  }
}

/** Finds the session of a client that comes back, gives it what it has missed, and says in each packet how far it has come. */
class Recovery {
  readonly sessions: Sessions;
  /** How many clients wait for their sessions. */
  #restoring = 0;
  readonly #handover: Handover;
  readonly #node: Node;
  readonly #nsp: OpenNamespace;
  readonly #routes: Routes;
  /** Whether an offset can be pasted into the text of an encoded packet: not with another parser than the default one. */
  readonly #pastes: boolean;
  readonly #sweep: Timeout;

  constructor(node: Node, nsp: OpenNamespace, maxMs: number, rooms: ReadonlyMap<Room, unknown>, follow: Follow) {
    this.#node = node;
    this.#nsp = nsp;
    this.#routes = node.routes(nsp.name);
    this.#pastes = node.parserSample === '2["name"]';
    // The last socket may have gone before the last session: nothing is removed, but Socket.IO looks once more.
    const emptied = () => void (this.#handover.isClosing || nsp._remove({ id: "" }));
    const { uid, settings } = node;
    this.sessions = new Sessions(
      uid,
      settings.recoveryBytes,
      maxMs,
      unnoticedMs(this.#nsp.server.opts),
      follow,
      emptied,
    );
    this.#handover = new Handover(node, this.#routes, this.sessions);
    this.#sweep = setInterval(() => this.sessions.expire(rooms), 1_000);
    this.#sweep.unref();
    nsp.prependListener("connect", this.#onConnect);
  }

  /** Whether clients wait for their sessions, or sessions for their clients: the namespace must stay open. */
  get keepsOpen(): boolean {
    return this.#restoring + this.sessions.size > 0;
  }

  /** The session of a client that comes back. Rejects where none waits, or what was missed is not known any more. */
  async restore(pid: string, offset: string): Promise<Restored> {
    this.#restoring++;
    try {
      return await this.#restore(pid, offset);
    } finally {
      this.#restoring--;
    }
  }

  async onMessage(message: RecoveryMessage, from: string, answer: (list: unknown[]) => void): Promise<void> {
    let list: unknown[] = [];
    try {
      if (message.type === "find") {
        const { pid, offset = "" } = message;
        await this.#closeOld(pid ?? "", offset);
        list = this.#handover.onFind(pid, offset);
      } else if (message.type === "claim") list = this.#handover.onClaim(message.pids, message.offset);
      else if (!this.#handover.isClosing) await this.#handover.takeOver([from], this.#until);
    } catch (error) {
      this.#node.reports.report(asError(error));
    }
    answer(list);
  }

  /** The packets of a delivery, each with an offset, by which the client says how far it has come. Keeps them. */
  stamped(delivery: Delivery): unknown[][] {
    const { sockets, target, frame, decoded } = delivery;
    if (decoded?.id !== undefined) return delivery.packets();
    const { log } = this.sessions;
    const isKept = frame ? frame.number > 0 : !delivery.target.flags?.volatile;
    let position = isKept && frame ? log.note(frame) + delivery.first : log.position;
    return delivery.packets().map((encoded) => {
      const parts = asParts(encoded);
      if (isKept)
        position = frame ? position + 1 : log.add(this.#routes.packets(delivery.target), parts, delivery.origin);
      return this.#stamp(parts, this.sessions.wrote(sockets, position));
    });
  }

  /** Hands the sessions over. Never rejects: the adapter closes, whatever becomes of them. */
  async close(): Promise<void> {
    await this.#handover.close(this.#until).catch((error) => this.#node.reports.report(asError(error)));
    clearInterval(this.#sweep);
    this.#nsp.off("connect", this.#onConnect);
  }

  /**
   * A socket is connected, and gets what it has missed. Socket.IO would send that before the answer to CONNECT: a client that
   * loses its connection between the two keeps it, and gets it twice.
   */
  readonly #onConnect = (socket: Socket): void => {
    const missed = this.sessions.connected(socket);
    if (!missed) return socket.client.conn.close(); // middlewares took too long: it begins anew
    for (const { parts, position } of missed) {
      const stamped = this.#stamp(parts, this.sessions.wrote([socket], position));
      socket.client.writeToEngine(stamped, { preEncoded: true });
    }
    // It was connected after Socket.IO had disconnected all others.
    if (this.#handover.isClosing) queueMicrotask(() => socket._onclose("server shutting down"));
  };

  /** Until when a session that is asked for now may be on its way (ms, monotonic). */
  get #until(): number {
    return performance.now() + this.#node.settings.requestsTimeout;
  }

  /**
   * Closes the old connection of a client that comes back before its loss was noticed. If the client had come back with this
   * same offset before, it may be there, and the caller may be somebody else: then it is closed only if it answers no ping.
   */
  async #closeOld(pid: string, offset: string): Promise<void> {
    const trail = this.sessions.trailOf(pid, offset);
    const socket = trail && this.#nsp.sockets.get(trail.sid);
    if (!socket || (offset === trail.presented && (await answersPing(socket.client.conn)))) return;
    const close = () => {
      try {
        socket._onclose("transport close"); // runs the user's listeners
      } finally {
        socket.client.conn.close();
      }
    };
    this.#node.reports.guard(() => `of socket '${socket.id}'`, close);
  }

  async #restore(pid: string, offset: string): Promise<Restored> {
    const until = this.#until;
    let asksAgain: boolean;
    do {
      await this.#closeOld(pid, offset);
      const trail = this.sessions.trailOf(pid, offset);
      const isMoving = !this.sessions.find(pid) && (await this.#handover.search(pid, offset, until));
      // An earlier attempt of this client may have got it meanwhile.
      asksAgain = isMoving || trail !== this.sessions.trailOf(pid, offset);
      if (asksAgain) await Bun.sleep(ASK_LATER);
    } while (asksAgain && performance.now() < until);
    const session = this.sessions.find(pid, offset);
    // A server that closes keeps the client waiting: when its connection ends, it finds its session on another one.
    if (this.#handover.isClosing) return new Promise(() => {});
    if (!session) throw new Error("No such session waits here or elsewhere");
    this.sessions.arrive(session, offset);
    return { ...session, missedPackets: [] };
  }

  #stamp(parts: readonly Part[], offset: string): unknown[] {
    const [text] = parts;
    if (this.#pastes && typeof text === "string") return [`${text.slice(0, -1)},"${offset}"]`, ...parts.slice(1)];
    const packet = decode(this.#nsp, parts);
    return this.#nsp.server.encoder.encode({ ...packet, data: [...packet.data, offset] });
  }
}

/** Whether the client of a connection answers a ping within 300 ms. */
async function answersPing(conn: EngineConnection): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  conn.once("heartbeat", () => resolve(true));
  conn.once("close", () => resolve(false));
  conn.sendPacket("ping");
  return (await within(300, promise)) === true;
}

const isMovingSession = (item: unknown): item is MovingSession => isLike(item, { pid: "", rooms: [] });
const isHandedSession = (item: unknown): item is HandedSession & InGroup =>
  isLike(item, { sid: "", pid: "", owner: "", rooms: [] });
const isMissed = (item: unknown): item is Missed & { of: string } => isLike(item, { of: "", parts: [] });
const isDelivered = (item: unknown): item is Delivered & InGroup => isLike(item, { rooms: [], except: [], parts: [] });
/** The answer to a claim begins with the number of the last frame of each peer that it covers, if that server is ready. */
const isHeard = (item: unknown): item is { heard: Record<string, number>; count: number } =>
  isLike(item, { heard: {}, count: 0 });

// ── The emitter ──────────────────────────────────────────────────────────────────────────────────────────────────────

/** The events of an emitter: an interface or type whose members are functions. */
export type EventMap<T> = { [K in keyof T]: (...args: never[]) => void };
type AnyEvents = Record<string, (...args: unknown[]) => void>;
type Rooms = Room | Room[];

/** Made by `createEmitter()`. `of()`, `to()`, `except()` and the flags return a new one; all share the connections. */
export class Emitter<Events extends EventMap<Events> = AnyEvents> {
  readonly #node: Node;
  /** Of the servers' parser, if it is not the default one. */
  readonly #encoder: Encoder | undefined;
  readonly #routes: Routes;
  readonly #opts: Required<BroadcastOptions>;

  constructor(
    node: Node,
    encoder: Encoder | undefined,
    routes: Routes = node.routes("/"),
    opts: Required<BroadcastOptions> = { rooms: new Set(), except: new Set(), flags: {} },
  ) {
    this.#node = node;
    this.#encoder = encoder;
    this.#routes = routes;
    this.#opts = opts;
  }

  /** Resolves once connected; rejects if the emitter is closed before. */
  get ready(): Promise<void> {
    return this.#node.opened.promise;
  }

  /** An emitter for another namespace, with the same rooms, also those left out, and flags. */
  of(nsp: string): Emitter<Events> {
    const name = nsp.startsWith("/") ? nsp : `/${nsp}`;
    return new Emitter<Events>(this.#node, this.#encoder, this.#node.routes(name), this.#opts);
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
   * @throws Error if the event's name is reserved, TypeError for a callback, or an argument that is not JSON with binary
   */
  emit<Name extends keyof Events & string>(name: Name, ...args: Parameters<Events[Name]>): true {
    const data = eventWithoutAnswer(RESERVED_EVENTS, [name, ...args]);
    const parts = this.#encoder?.encode({ type: EVENT, nsp: this.#routes.nsp, data });
    if (parts) return this.#add(this.#routes.packets(this.#opts), parts);
    return this.#send({ type: "packet", opts: toWire(this.#opts), data });
  }

  socketsJoin(rooms: Rooms): void {
    this.#routes.joinFromAfar([rooms].flat());
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
    this.#send({ type: "emit", id: undefined, args: eventWithoutAnswer(SERVER_EVENTS, [name, ...args]) });
  }

  /**
   * Resolves when the broker has confirmed everything; rejects, with the number of packets that are left, if it has not within
   * `closeTimeout`. Closes the connections, which all emitters derived from the same one share.
   */
  async close(): Promise<void> {
    await this.#node.close(this.#node.settings.closeTimeout);
  }

  #with(opts: Partial<Required<BroadcastOptions>>): Emitter<Events> {
    return new Emitter<Events>(this.#node, this.#encoder, this.#routes, { ...this.#opts, ...opts });
  }

  #send(message: Message): true {
    return this.#add(this.#routes.message(message), encodeValue(message));
  }

  #add(to: Destination, parts: readonly unknown[]): true {
    if (this.#node.closing) throw new Error("The emitter is closed");
    this.#node.sender.add(to, parts);
    return true;
  }
}

/** An event's name and arguments. @throws Error for a reserved name, TypeError for a callback */
function eventWithoutAnswer(reserved: RegExp, data: [name: string, ...args: unknown[]]): unknown[] {
  if (reserved.test(data[0])) throw new Error(`"${data[0]}" is a reserved event name`);
  if (typeof data.at(-1) !== "function") return data;
  throw new TypeError("An emitter cannot wait for answers; leave out the callback");
}

// ── The node: one server's (or emitter's) place in the cluster ───────────────────────────────────────────────────────

/** The frame that brought a packet: its sender, and its number, which is 0 for volatile packets. */
type Origin = Pick<Frame, "sender" | "number">;

/** A namespace of this server, as its node sees it: an adapter. */
interface Tenant {
  readonly nsp: { readonly name: string };
  /** The routing key of what is for everyone in it. */
  readonly key: string;
  /** Its rooms by the routing key of their packets. */
  readonly roomsByKey: ReadonlyMap<string, readonly Room[]>;
  /** Resolves once it is closed; undefined while it is open. */
  readonly closing: Promise<void> | undefined;
  /** Settled when the namespace is bound and the other servers are known, or closed. */
  readonly opened: PromiseWithResolvers<void>;
  /** Packets of a peer, encoded by it. */
  onPackets(section: Section, frame: Frame): void;
  onMessage(message: Message, origin: Origin): void;
  /** Emits an `error`; false where nobody listens. */
  report(error: Error): boolean;
  /** Emits `connect` or `disconnect` with the connection's name. */
  onConnection(event: "connect" | "disconnect", connection: string): void;
}

/** Settings that must be the same on all servers and emitters, by the names that users know. */
type Shared = Record<string, unknown>;

/** What the parts of a node share, and the parts themselves. */
abstract class Context {
  readonly uid: string = randomBytes(6).toString("base64url"); // 8 characters: what a frame's header has room for
  readonly settings: Settings;
  readonly names: Names;
  /** What the servers' parser makes of an event, where that is known. */
  readonly parserSample: string | undefined;
  /** The user's, of an emitter. */
  readonly onError: ((error: Error) => void) | undefined;
  readonly reports: Reports = new Reports(this);
  /** The namespaces of this server, by name; an emitter has none. */
  readonly tenants: Map<string, Tenant> = new Map();
  /** Connected, bound, announced and acquainted with the peers for the first time. */
  readonly opened: PromiseWithResolvers<void> = Promise.withResolvers<void>();
  abstract readonly sender: Sender;
  abstract readonly receiver: Receiver;
  abstract readonly requests: Requests;
  abstract readonly membership: Membership;
  abstract readonly inbox: Inbox;

  constructor(settings: Settings, encoder?: Encoder, onError?: (error: Error) => void) {
    this.settings = settings;
    this.names = new Names(settings.prefix);
    this.parserSample = encoder && sampleOf(encoder);
    this.onError = onError;
    this.opened.promise.catch(() => {}); // rejects only on close(), which nobody has to await
  }

  /** Since when both connections are up (ms, monotonic); undefined while one is not. */
  get upSince(): number | undefined {
    const [consuming, publishing] = [this.receiver.connection.upSince, this.sender.connection.upSince];
    return consuming === undefined || publishing === undefined ? undefined : Math.max(consuming, publishing);
  }

  get shared(): Shared {
    const { socketRooms, maxPayload, journal } = this.settings;
    const ofServers = this.tenants.size > 0 ? { socketRooms } : {};
    return { ...ofServers, maxPayload, "journal.ms": journal.ms, parser: this.parserSample };
  }

  /** A connection is up or lost. */
  changed(event: "connect" | "disconnect", connection: string): void {
    if (event === "connect") this.membership.resume();
    for (const tenant of this.tenants.values()) tenant.onConnection(event, connection);
  }
}

/** A part of a node. */
abstract class NodePart {
  protected readonly context: Context;

  constructor(context: Context) {
    this.context = context;
  }
}

/** What a user should know: handed to all listeners, and where there are none to the process, once per kind and outage. */
class Reports extends NodePart {
  last: Error | undefined;
  /** Kinds of errors that the process was warned of in this outage. */
  readonly warned: Set<string> = new Set();
  /** What was reported of frames of an unknown version, once per sender, within bounds. */
  readonly #unknown = new Set<string>();

  readonly report = (error: Error): void => {
    this.last = error;
    debug("%s", error.message);
    // Deferred: a listener that is added right after the adapter was made hears of a connection that fails at once.
    queueMicrotask(() => {
      const { onError, tenants } = this.context;
      if (onError) return onError(error);
      const heard = [...tenants.values()].map((tenant) => tenant.report(error));
      const kind = kindOf(error);
      if (heard.includes(true) || this.warned.has(kind)) return;
      this.warned.add(kind);
      process.emitWarning(`${error.message} (listen for "error" on the adapter, or pass onError)`, "SocketIoAmqp");
    });
  };

  /** Reports settings of a peer that must be the same as here, and are not. */
  compare(uid: string, ours: Shared, theirs: Shared): void {
    for (const [name, value] of Object.entries(ours)) {
      if (value === undefined || theirs[name] === undefined || theirs[name] === value) continue;
      const values = `${Bun.inspect(value)} here and ${Bun.inspect(theirs[name])} on peer '${uid}'`;
      this.report(new Error(`${name} is ${values}; give all of them the same`));
    }
  }

  /** Handles a message, or a part of one: what cannot be read or handled costs nothing else. */
  guard(source: () => string, handle: () => void): void {
    try {
      handle();
    } catch (reason) {
      const error = asError(reason);
      if (error instanceof UnknownVersion) {
        if (this.#unknown.has(error.message) || this.#unknown.size >= 1_000) return;
        this.#unknown.add(error.message);
      }
      const what = error instanceof FrameError ? "Dropped" : "Failed to handle a message:";
      this.report(new Error(`${what} ${error.message} (${source()})`, { cause: error }));
    }
  }
}

/** Another server or emitter that has been heard of. Times are in ms, monotonic. */
interface Peer {
  readonly uid: string;
  readonly stream: PeerStream<Frame>;
  heardAt: number;
  /** When it last said hello, which it does once its queue is bound; 0 for a stranger. */
  greetedAt: number;
  /** What it has open; undefined until it has said so, and while it is silent or has no queue. */
  namespaces?: Set<string> | undefined;
  /** Since when its queue is gone; undefined while it is there, as far as is known. */
  queueGoneAt?: number | undefined;
  /** When it made the announcement that `namespaces` are of, by its own clock. */
  revision?: number;
  /** How many keys it has bound, by its last heartbeat. */
  bindings: number;
  /** What it has last asked for, and when the answer last got on. */
  replay?: { readonly id: number; readonly after: number | undefined; at: number } | undefined;
}

/** How often peers are pinged that owe an answer or a heartbeat, and asked that owe frames, in ms. */
const WATCH_INTERVAL = 250;
/** At least this long between two announcements, of which each lists all namespaces (ms). */
const announceInterval = (namespaces: number): number => 20 + namespaces / 50;
/** How long answers to a server's first hello are waited for, beyond two round trips to the broker, in ms. */
const MEETING = 20;
/** A round trip that takes longer than this (ms) had to wait for the broker, which blocks publishers at times. */
const FAR = 300;
/** After how many ms without a word of an answer a peer is asked again for what was missed. */
const ASK_AGAIN = 500;
/** For how many ms after an outage, this server's or a peer's, the peer's queue may not be back yet. */
const GRACE = 2_000;
/** For how many ms a peer without a queue may come back: one that the broker refuses tries again after 10 s. */
const RETURN = 20_000;

/** Who else is there, and what servers tell each other about themselves. */
class Membership extends NodePart {
  readonly peers: Map<string, Peer> = new Map();
  /** The announcement that is about to be made. */
  #announcement: Promise<void> | undefined;
  #acquainted: Promise<void> | undefined;
  /** When the last announcement was made (ms, monotonic); 0 if there was none or the broker did not take it. */
  #announcedAt = 0;
  /** How many keys were bound at the last heartbeat. */
  #toldBindings = 0;

  /** The servers that have a namespace open, this one not counted. */
  serversOf(nsp: string): string[] {
    const uids: string[] = [];
    for (const peer of this.peers.values()) if (peer.namespaces?.has(nsp)) uids.push(peer.uid);
    return uids;
  }

  /** The number of the last frame that came of each peer; undefined while some may be missing. */
  heard(): Record<string, number> | undefined {
    const peers = [...this.peers.values()];
    // Nobody waits for one whose queue is gone.
    if (peers.some(({ stream, queueGoneAt }) => stream.catchUp && queueGoneAt === undefined)) return undefined;
    return Object.fromEntries(peers.map(({ uid, stream }) => [uid, stream.highest]));
  }

  /** How many keys are bound, on all servers. */
  get bindings(): number {
    return this.peers.values().reduce((sum, { bindings }) => sum + bindings, this.context.receiver.countBound());
  }

  onControl(peer: Peer, control: Control): void {
    const { sender, reports, requests, shared, upSince } = this.context;
    const isUp = upSince !== undefined; // else it is announced soon what is open here
    const { uid, stream } = peer;
    switch (control.type) {
      case "hello":
        if (peer.greetedAt === 0) reports.compare(uid, shared, control.shared);
        peer.namespaces = new Set(control.namespaces);
        requests.onLeave(uid, peer.namespaces);
        peer.revision = control.revision;
        peer.greetedAt = peer.heardAt;
        peer.queueGoneAt = undefined;
        if (stream.catchUp) stream.catchUp.askAt = 0; // its queue is back
        stream.hears(control.number, control.floor);
        if (control.reply && isUp) void sender.tell(this.#hello(false), uid);
        return;
      case "beat":
        peer.bindings = control.bindings;
        stream.hears(control.number, control.floor);
        if (isUp && !(peer.namespaces && peer.revision === control.revision)) void sender.tell(this.#hello(true), uid);
        return;
      case "ping":
        return void sender.tell(this.#beat(), uid);
      case "bye":
        this.#leaves(peer);
        this.#giveUp(peer, "has closed", control.number);
        peer.queueGoneAt = peer.heardAt; // `watch()` forgets it: sessions that move may ask what came of it
        return;
      case "ask":
        return sender.replay(peer, control);
      case "begin":
        if (stream.catchUp?.id !== control.id) return; // the answer to an earlier question
        stream.catchUp.askAt = peer.heardAt + ASK_AGAIN;
        return stream.begin(control.from, control.to);
    }
  }

  /** A message to its queue came back. */
  onUnreachable(uid: string): void {
    const peer = this.peers.get(uid);
    if (!peer || this.#mayComeBack(peer)) return;
    if (peer.namespaces) this.#leaves(peer);
    peer.queueGoneAt ??= performance.now();
  }

  /** The broker takes messages, of which it may have taken none for a while. */
  resume(): void {
    if (this.context.upSince === undefined) return;
    this.context.reports.warned.clear();
    void this.announce();
    this.watch();
  }

  /** Tells everyone what is open here, which is then open for its users too. What changes until it is sent goes with it. */
  announce(): Promise<void> {
    return (this.#announcement ??= this.#announceSoon());
  }

  /** Every `WATCH_INTERVAL`: looks after peers that owe frames, an answer or a heartbeat. */
  watch(): void {
    const { upSince = performance.now(), receiver, requests, settings, sender } = this.context;
    const { heartbeatInterval, heartbeatTimeout, journal } = settings;
    // A storm of joins: peers route by it, and should know before the next heartbeat.
    if (receiver.countBound() > 2 * this.#toldBindings + FEW_BINDINGS) void this.beat();
    const now = performance.now();
    for (const peer of this.peers.values()) {
      this.ask(peer);
      // It may have lost its connection for a moment; killed, it will not come back.
      if (now - Math.max(peer.queueGoneAt ?? now, upSince) > RETURN) this.#giveUp(peer, "has no queue any more");
      // Counted to the last delivery, from the end of an outage or of a pause in which this process was held up: while the queue
      // brings nothing, nobody is silent.
      const silence = receiver.heardAt - Math.max(peer.heardAt, upSince, receiver.heardSince);
      const isLate = silence > Math.min(heartbeatInterval + WATCH_INTERVAL, heartbeatTimeout - 2 * WATCH_INTERVAL);
      // If its queue is gone the ping comes back, and nobody waits for it.
      if (peer.namespaces && (isLate || requests.isAwaited(peer.uid))) void sender.tell({ type: "ping" }, peer.uid);
      if (peer.namespaces && silence > heartbeatTimeout) this.#leaves(peer);
      if (silence <= heartbeatTimeout + journal.ms) continue; // it may come back, and publish again what has been seen
      this.#giveUp(peer, "is silent");
      this.peers.delete(peer.uid);
    }
  }

  /** Asks a peer for what may have been missed, unless it was asked just now or the answer is coming. */
  ask(peer: Peer): void {
    const { upSince = Infinity, receiver, sender } = this.context;
    const { catchUp, cursor: after } = peer.stream;
    const now = performance.now();
    const goneSince = Math.max(peer.queueGoneAt ?? now, upSince); // in an outage of this server's nobody hears of its return
    if (!catchUp || catchUp.askAt > now || upSince > now || now - goneSince > RETURN) return;
    catchUp.askAt = now + ASK_AGAIN;
    const ms = after === undefined ? Math.ceil(now - (receiver.awaySince ?? now)) : undefined;
    void sender.tell({ type: "ask", id: catchUp.id, after, ms }, peer.uid);
  }

  /** During an outage or right after it: resolves when all peers are back and can ask for what they missed, or after `GRACE`. */
  async reunited(until: number): Promise<void> {
    const end = Math.min(until, performance.now() + GRACE);
    const isAwaited = (peer: Peer) => peer.namespaces !== undefined && this.#mayComeBack(peer);
    while (performance.now() < end && this.peers.values().some(isAwaited)) await Bun.sleep(20);
  }

  /** Every `heartbeatInterval`. */
  async beat(): Promise<void> {
    const { sender, receiver } = this.context;
    const beat = this.#beat();
    const sentAt = performance.now();
    if (!(await sender.tell(beat))) return;
    this.#toldBindings = beat.bindings;
    receiver.onBeat(sentAt);
  }

  /** Right after an outage a peer's queue may just not be back yet. */
  #mayComeBack({ greetedAt }: Peer): boolean {
    const now = performance.now();
    const { upSince = now } = this.context;
    return greetedAt < upSince && now - upSince < GRACE;
  }

  async #announceSoon(): Promise<void> {
    await Bun.sleep(Math.max(0, this.#announcedAt + announceInterval(this.context.tenants.size) - performance.now()));
    this.#announcement = undefined;
    const { upSince, sender, receiver } = this.context;
    if (upSince === undefined) return; // the next connection announces
    const asksOthers = this.#announcedAt < upSince; // the first one on these connections
    const now = (this.#announcedAt = Math.ceil(performance.now()));
    this.#toldBindings = 0; // a peer that had lost sight of this server counts 0 for it
    const tenants = receiver.liveTenants;
    if (await sender.tell(this.#hello(asksOthers))) {
      await (this.#acquainted ??= this.#meet(Math.min(performance.now() - now, FAR)));
      for (const { opened } of [...tenants, this.context]) opened.resolve();
    } else this.#announcedAt = 0;
  }

  /** After the first hello, whose round trip took some ms: resolves when no more peers answer it. */
  async #meet(roundTrip: number): Promise<void> {
    for (let known = -1; known < this.peers.size; await Bun.sleep(2 * roundTrip + MEETING)) known = this.peers.size;
  }

  #beat(): Control & { type: "beat" } {
    const { number, floor } = this.context.sender.publisher;
    return { type: "beat", revision: this.#announcedAt, number, floor, bindings: this.context.receiver.countBound() };
  }

  #hello(reply: boolean): Control {
    const { sender, receiver, shared } = this.context;
    const { number, floor } = sender.publisher;
    const namespaces = receiver.liveTenants.map(({ nsp }) => nsp.name);
    return { type: "hello", revision: this.#announcedAt, reply, namespaces, number, floor, shared };
  }

  /** A peer closes, or nobody can reach it: nobody waits for its answers. */
  #leaves(peer: Peer): void {
    peer.namespaces = undefined;
    peer.bindings = 0;
    peer.replay = undefined;
    this.context.requests.onLeave(peer.uid);
    this.context.receiver.renewSoon();
  }

  /** What the peer has sent is delivered as far as it is here; `last` is the number of its last frame, where that is known. */
  #giveUp({ uid, stream }: Peer, why: string, last?: number): void {
    if (!stream.catchUp || (last === undefined && stream.catchUp.held.size === 0)) return;
    const { cursor = 0 } = stream;
    const missing = stream.giveUp(last);
    if (last !== undefined && missing === 0) return;
    this.context.inbox.counts.lost += missing;
    const what = `frames after number ${cursor} are lost, ${missing} at least`;
    this.context.reports.report(new Error(`Peer '${uid}' ${why}: ${what}`));
  }
}

/** What becomes of the answers to a question. */
interface Answers {
  /** Takes an answer; true once that peer has said all. */
  readonly take: (message: Answer, from: string) => boolean;
  /** A peer has said all, or has left. */
  readonly done?: ((uid: string) => void) | undefined;
}
/** `owing`: the peers that have not said all; when there are none, the request ends. */
type Request = Answers & {
  readonly nsp: string;
  readonly owing: Set<string>;
  end(): void;
  readonly ended: Promise<void>;
};

/** Questions to peers, and who has not answered yet. */
class Requests {
  readonly #open = new Map<string, Request>();

  /** Resolves when each of `peers` has said all or has left, or after `ms`, with how many have not. */
  ask(nsp: string, peers: string[], ms: number, send: (id: string) => void, answers: Answers): Promise<number> {
    if (peers.length === 0) return Promise.resolve(0);
    const id = randomUUID();
    send(id); // throws if it cannot be encoded, and then there is no request
    const { promise: ended, resolve: end } = Promise.withResolvers<void>();
    const owing = new Set(peers);
    this.#open.set(id, { ...answers, nsp, owing, end, ended });
    return within(ms, ended).then(() => {
      this.#open.delete(id);
      return owing.size;
    });
  }

  onAnswer(message: Answer, from: string): void {
    const request = this.#open.get(message.id);
    if (request?.owing.has(from) && request.take(message, from)) this.#finish(request, from);
  }

  /** A peer is gone, or has only these namespaces open: nobody waits for its other answers. */
  onLeave(uid: string, namespaces?: ReadonlySet<string>): void {
    for (const request of this.#open.values()) if (!namespaces?.has(request.nsp)) this.#finish(request, uid);
  }

  /** Whether somebody waits for this peer. */
  isAwaited(uid: string): boolean {
    return this.#open.values().some(({ owing }) => owing.has(uid));
  }

  /** Resolves when all that were asked in a namespace are answered. */
  async answered(nsp: string): Promise<void> {
    await Promise.all([...this.#open.values()].map((request) => request.nsp === nsp && request.ended));
  }

  close(): void {
    for (const { end } of this.#open.values()) end();
  }

  #finish({ owing, done, end }: Request, uid: string): void {
    if (!owing.delete(uid)) return;
    done?.(uid);
    if (owing.size === 0) end();
  }
}

/** How many bindings are cheap to scan. */
const FEW_BINDINGS = 500;
/** The most bytes that a frame of one packet takes beside its head and parts, and a word for each part. */
const OVERHEAD = 768;
/** The AMQP type of a frame that its receiver has asked for again. */
const AGAIN = "again";
/** How many replayed frames may be unconfirmed. */
const REPLAY_WINDOW = 64;

/** The publishing connection, and the publisher on it. */
class Sender extends NodePart implements ConnectionEvents {
  readonly connection: Connection = new Connection("publishing", this.context, this);
  dropped = 0;
  #reportedDropped = 0;
  #flushing: Timeout | undefined;
  /** Resolves when all replays that have been begun are sent. */
  #replayed: Promise<void> = Promise.resolve();
  #looksKeysUp = false;
  #maxKeyBytes = 0;
  readonly #facts: RoutingFacts = {
    servers: (nsp) => this.context.membership.serversOf(nsp).length,
    maxKeyBytes: () => (this.#looksKeysUp || this.context.membership.bindings <= FEW_BINDINGS ? this.#maxKeyBytes : 0),
  };
  readonly publisher: Publisher = new Publisher(this.context.uid, this.context.settings, this.#facts, {
    dropped: (packets) => (this.dropped += packets),
    flushIn: (ms) => {
      if (ms === 0) return queueMicrotask(this.publisher.flush);
      this.#flushing ??= setTimeout(() => {
        this.#flushing = undefined;
        this.publisher.flush();
      }, ms);
    },
  });

  /** A packet for a destination. Volatile ones are dropped while the broker is away. Returns false for one that is too large. */
  add(to: Destination, parts: readonly unknown[]): boolean {
    const packet = asParts(parts);
    if (packet.length === 0) return true; // the parser's way to say nothing
    let length = to.head.length;
    for (const part of packet) length += part.length;
    const { maxPayload } = this.context.settings;
    const overhead = OVERHEAD + 4 * packet.length;
    let size = length * 3 + overhead; // at most
    if (size > maxPayload) size = [to.head, ...packet].reduce((sum, part) => sum + Buffer.byteLength(part), overhead);
    if (size <= maxPayload) this.publisher.add(to, packet, length);
    else this.#giveUp(1, `A packet of ${size} bytes was not sent: maxPayload is ${maxPayload} bytes`);
    return size <= maxPayload;
  }

  /** Tells one peer or all, now or not at all; resolves with whether the broker took it. */
  tell(control: Control, uid?: string): Promise<boolean> {
    const key = uid === undefined ? ALL_SERVERS : serverKey(uid);
    return this.publisher.sendNow(key, controlFrame(this.context.uid, control));
  }

  /** Answers a peer that asks for what it has missed: the frames of the log, one by one, straight to the peer's queue. */
  replay(peer: Peer, { id, after, ms = 0 }: Control & { type: "ask" }): void {
    const { replay: latest } = peer;
    const now = performance.now();
    // A repeated question: the answer is still in the peer's queue, unless that takes too long.
    if (latest?.id === id && now - latest.at < this.context.settings.heartbeatTimeout) return;
    const sent = this.#sendAgain(peer, (peer.replay = { id, after, at: now }), now - ms);
    this.#replayed = this.#replayed.then(() => sent);
  }

  /** Every `heartbeatInterval`: forgets what is too old, and reports together what was dropped. */
  tick(): void {
    this.publisher.expire();
    const packets = this.dropped - this.#reportedDropped;
    this.#reportedDropped = this.dropped;
    if (packets === 0) return;
    const { maxQueued, journal } = this.context.settings;
    const limits = `at most ${maxQueued} bytes, and ${journal.ms} ms without a broker`;
    this.context.reports.report(new Error(`Dropped ${packets} packets that waited: ${limits}`));
  }

  /** Sends the rest and a goodbye, as far as that takes no longer than `ms`; gives the number of packets that are left. */
  async close(ms: number): Promise<number> {
    // What a peer has missed would go with this server.
    await within(ms, Promise.all([this.#replayed, this.publisher.drained()]));
    this.tick(); // first: what is dropped now is not left as well
    const left = this.publisher.unconfirmedPackets;
    const bye = this.tell({ type: "bye", number: this.publisher.number });
    this.publisher.down(); // nothing is said after a goodbye
    if (left === 0) await within(CLOSE_PATIENCE, bye);
    clearTimeout(this.#flushing);
    return left;
  }

  async #sendAgain(peer: Peer, replay: NonNullable<Peer["replay"]>, since: number): Promise<void> {
    const { publisher } = this;
    publisher.expire();
    const { log, number: to } = publisher;
    const from = Math.max(log.first, replay.after === undefined ? log.firstSince(since) : replay.after + 1);
    let taken = this.tell({ type: "begin", id: replay.id, from, to }, peer.uid);
    for (let number = from; number <= to; number++) {
      if ((number - from) % REPLAY_WINDOW === 0 && !(await taken)) break;
      if (peer.replay !== replay) return; // it has asked anew, or has left
      replay.at = performance.now();
      const body = log.get(number);
      if (!body) return void (peer.replay = undefined); // forgotten meanwhile: it asks again
      taken = publisher.sendNow(serverKey(peer.uid), body, true);
    }
    if (!(await taken) && peer.replay === replay) peer.replay = undefined;
  }

  async up(model: AmqpConnection, lose: Lose): Promise<() => void> {
    const { names, reports, membership } = this.context;
    const channel = watchChannel(await model.createConfirmChannel(), lose);
    channel.on("return", ({ fields }) => membership.onUnreachable(fields.routingKey.slice(ALL_SERVERS.length)));
    const events: NodeJS.EventEmitter = model;
    events.on("blocked", (reason: string) => {
      this.publisher.block(true);
      reports.report(new Error(`The broker blocks publishing: ${reason}`));
    });
    events.on("unblocked", () => {
      this.publisher.block(false);
      membership.resume();
    });
    await declare(channel, names);
    const transmit: Transmit = ({ keys: [key = "", ...CC], body, viaKeys, again }, confirmed) => {
      const options: Options.Publish = viaKeys ? { mandatory: key !== ALL_SERVERS } : {};
      if (CC.length > 0) options.CC = CC;
      if (again) options.type = AGAIN;
      try {
        channel.publish(viaKeys ? names.keyExchange : names.mainExchange, key, body, options, (error: Error | null) =>
          confirmed(!error ? "taken" : error.message === "message nacked" ? "refused" : "lost"),
        );
      } catch (error) {
        lose(asError(error)); // the channel has just closed
        confirmed("lost");
      }
    };
    return () => {
      const { brokerVersion, frameMax } = internals(model);
      this.#looksKeysUp = Bun.semver.order(brokerVersion, "3.11.0") >= 0; // before, it scanned all bindings
      // Less what the message's other properties take. amqplib has room for 65,536 bytes.
      this.#maxKeyBytes = Math.min(frameMax, 65_536) - 1_024;
      this.publisher.up(transmit);
    };
  }

  down(error: BrokerError): void {
    // A message that is larger than the broker or the connection allows would close the next channel as well.
    const isTooLarge = (error.code === 406 && error.classId === 60) || error.code === 501;
    const refused = isTooLarge ? this.publisher.giveUpLargest() : undefined;
    const what = `A frame of ${refused?.size} bytes was refused: ${error.message}; lower maxPayload`;
    if (refused) this.#giveUp(refused.packets, what);
    this.publisher.down();
  }

  /** Counts and reports packets that are too large. */
  #giveUp(packets: number, what: string): void {
    this.dropped += packets;
    this.#reportedDropped += packets;
    this.context.reports.report(new RangeError(what));
  }
}

/** The origin of what other AMQP clients publish. */
const FOREIGN: Origin = { sender: "foreign.", number: 0 };
/** How many ms after a queue has gone the rooms' exchanges are bound again. */
const RENEW_AFTER = 2_000;

/** The consuming connection: the queue, what it is bound to, and what it delivers. */
class Receiver extends NodePart implements ConnectionEvents {
  readonly connection: Connection = new Connection("consuming", this.context, this);
  /** When the queue last delivered something: it brings this server's own heartbeats too (ms, monotonic). */
  heardAt: number = performance.now();
  /** Since when it does so without a pause as long as `heartbeatTimeout`. */
  heardSince = 0;
  /** The oldest heartbeat of this server that the queue may still have to bring (ms, monotonic). */
  #beat = { sentAt: 0, confirmedAt: 0 };
  /** When the queue was first away, maybe at the start (ms, monotonic). Peers that sent before are known. */
  awaySince: number | undefined;
  #topology: Topology | undefined;
  /** Resolves when the connection that is being opened is live or has failed. */
  #opening: PromiseWithResolvers<void> | undefined = Promise.withResolvers<void>();
  /** How many queues were made. */
  #generation = 0;
  /** Rooms' exchanges that were to be declared, and to which no queue may have been bound yet. */
  readonly #unbound = new Set<string>();
  #renewal: Timeout | undefined;

  /** Binds or unbinds a key as the rooms want it. Resolves when one that is wanted is live, or once connecting has failed. */
  follow(key: string): Promise<void> | undefined {
    return this.#topology ? this.#topology.follow(key) : this.#opening?.promise;
  }

  /** The namespaces whose packets come to the queue. */
  get liveTenants(): Tenant[] {
    return [...this.context.tenants.values()].filter(({ key }) => this.#topology?.bindings.isLive(key));
  }

  /** How many of these keys are bound; of all if none are given. */
  countBound(keys?: Iterable<string>): number {
    const bound = this.#topology?.bindings.bound ?? new Map<string, Way>();
    return keys ? [...keys].filter((key) => bound.has(key)).length : bound.size;
  }

  /** Whether what is published under a key, by its digest, should come to this queue. */
  readonly expects = (digest: number): boolean => this.#topology?.bindings.expects(digest) ?? false;

  /**
   * The broker has confirmed a heartbeat of this server, which the queue brings too. A queue that gets nothing is given up: somebody
   * has unbound it, or deleted an exchange that others have declared anew.
   */
  onBeat(sentAt: number): void {
    const now = performance.now();
    const { upSince = now, settings } = this.context;
    if (this.heardAt >= this.#beat.sentAt) this.#beat = { sentAt, confirmedAt: now };
    else if (now - Math.max(this.#beat.confirmedAt, upSince) > settings.heartbeatTimeout)
      this.connection.lose(new Error("The queue gets nothing any more"));
  }

  /** A peer's queue has gone: an exchange of a room may have gone with it that others have bound just then. */
  renewSoon(): void {
    if (!this.#topology) return; // the next connection binds all
    this.#renewal ??= setTimeout(() => {
      this.#renewal = undefined;
      this.#topology?.renew();
    }, RENEW_AFTER);
  }

  async close(patienceMs: number): Promise<void> {
    if (this.#topology) await within(patienceMs, this.#topology.close());
    await this.connection.close();
    clearTimeout(this.#renewal);
  }

  /** Everything that the consuming connection needs, at the start and after each loss. */
  async up(model: AmqpConnection, lose: Lose): Promise<() => void> {
    this.#opening ??= Promise.withResolvers<void>();
    // A new name each time: after a half-open link the broker may still hold the old queue.
    const topology = new Topology(model, lose, this.context, ++this.#generation, this.#unbound);
    await topology.open((message) => this.#receive(message));
    return () => this.#use(topology);
  }

  /** Something may be missed from here on: each peer is asked for it. An emitter misses nothing. */
  down(): void {
    const { tenants, membership } = this.context;
    this.awaySince ??= this.heardAt; // the loss is noticed later
    this.#topology?.end();
    this.#use(undefined);
    if (tenants.size > 0) for (const { stream } of membership.peers.values()) stream.startCatchUp();
  }

  #use(topology: Topology | undefined): void {
    this.#topology = topology;
    this.#opening?.resolve();
    this.#opening = undefined;
  }

  #receive({ content, fields, properties }: ConsumeMessage): void {
    const { reports, inbox, settings } = this.context;
    const now = performance.now();
    if (now - this.heardAt > settings.heartbeatTimeout) this.heardSince = now;
    this.heardAt = now;
    const source = () => `exchange '${fields.exchange}', routing key '${fields.routingKey}'`;
    reports.guard(source, () => {
      const { contentType, headers, type } = properties;
      if (typeof contentType === "string" && contentType.startsWith("application/json"))
        this.#onForeign(content, fields, headers?.["CC"]);
      else inbox.onFrame(readFrame(content), type === AGAIN);
    });
  }

  /** An event from any AMQP client: the routing keys, or the room's exchange, name the rooms. */
  #onForeign(content: Buffer, { exchange, routingKey }: ConsumeMessage["fields"], cc: unknown): void {
    const { names, tenants, settings } = this.context;
    checkSize(content, settings);
    const text = content.toString();
    // Before it is parsed: a few thousand nested brackets would take milliseconds.
    const data = /^\s*\[\s*"/.test(text) ? parseJson(text) : undefined;
    if (!isList(data))
      throw new FrameError(`${JSON.stringify(text.slice(0, 20))}; expected an array that begins with a string`);
    const isRoomExchange = exchange !== names.mainExchange && exchange !== names.keyExchange;
    const keys = isRoomExchange
      ? (this.#topology?.bindings.viaExchange() ?? []).filter((key) => names.roomExchange(key) === exchange)
      : [routingKey, ...(Array.isArray(cc) ? cc.map(String) : [])];
    for (const tenant of tenants.values()) {
      const isForAll = keys.includes(tenant.key);
      const rooms = isForAll ? [] : keys.flatMap((key) => tenant.roomsByKey.get(key) ?? []);
      if (!isForAll && rooms.length === 0) continue;
      tenant.onMessage({ type: "packet", opts: { rooms, except: [], flags: {} }, data }, FOREIGN);
    }
  }
}

/** The frames of each peer: put in order, asked for where they are missing, and delivered. */
class Inbox extends NodePart {
  readonly counts = { framesReceived: 0, packetsReceived: 0, replayed: 0, duplicates: 0, lost: 0 };

  onFrame(frame: Frame, again: boolean): void {
    const { uid, tenants, membership, receiver } = this.context;
    if (frame.sender === uid) return;
    const peer = membership.peers.get(frame.sender) ?? this.#newPeer(frame.sender);
    const { stream } = peer;
    peer.heardAt = receiver.heardAt;
    if (frame.kind === FrameKind.Control) membership.onControl(peer, readControl(frame));
    else if (tenants.size === 0)
      return; // an emitter takes none
    else if (!again) stream.receive(frame, predecessorsOf(frame, receiver.expects, stream.hasNot));
    else if (!stream.receiveAgain(frame)) stream.startCatchUp();
    else if (stream.catchUp) stream.catchUp.askAt = peer.heardAt + ASK_AGAIN;
    if (stream.catchUp) membership.ask(peer);
  }

  #newPeer(uid: string): Peer {
    const { settings, reports, tenants, membership, receiver } = this.context;
    const { counts } = this;
    const events = {
      deliver: this.#deliver,
      replayed: () => counts.replayed++,
      duplicate: () => counts.duplicates++,
      lost: (frames: number) => {
        counts.lost += frames;
        reports.report(new Error(`Lost up to ${frames} frames of peer '${uid}': its journal no longer holds them`));
      },
    };
    const stream = new PeerStream<Frame>(events, settings.journal.bytes);
    const peer = { uid, stream, heardAt: 0, greetedAt: 0, bindings: 0 };
    membership.peers.set(uid, peer);
    // Whoever is heard for the first time may have begun to send during an outage.
    const wasAway = receiver.awaySince !== undefined && tenants.size > 0;
    const { upSince = receiver.heardAt } = receiver.connection;
    if (wasAway && receiver.heardAt - upSince < settings.journal.ms) stream.startCatchUp();
    return peer;
  }

  readonly #deliver = (frame: Frame): void => {
    const { uid, tenants, reports, settings } = this.context;
    this.counts.framesReceived++;
    this.counts.packetsReceived += frame.packets;
    const source = () => `peer '${frame.sender}'`;
    reports.guard(source, () => {
      checkSize(frame.body, settings); // only here: a frame that did not count as come would be asked for without end
      const { nsp, sections } = readSections(frame);
      const tenant = tenants.get(nsp);
      if (!tenant) return;
      for (const section of sections) {
        if (section.kind === SectionKind.Direct && section.head !== uid) continue;
        if (section.kind < SectionKind.Messages) reports.guard(source, () => tenant.onPackets(section, frame));
        else
          for (const parts of takePackets(section))
            reports.guard(source, () => tenant.onMessage(readMessage(parts), frame));
      }
    });
  };
}

/** How many namespaces an emitter remembers: it may meet any number of them. */
const MAX_NAMESPACES = 1_000;

/** Wires the parts of one server together, or of one emitter. A server's namespaces share it. */
class Node extends Context {
  readonly requests: Requests = new Requests();
  readonly sender: Sender = new Sender(this);
  readonly receiver: Receiver = new Receiver(this);
  readonly membership: Membership = new Membership(this);
  readonly inbox: Inbox = new Inbox(this);
  closing: Promise<void> | undefined;
  readonly #routes = new Map<string, Routes>();
  readonly #timers: Timeout[] = [];

  get stats(): Omit<AdapterStats, "rooms"> {
    const { publisher, dropped, connection } = this.sender;
    return {
      connected: this.upSince !== undefined,
      framesSent: publisher.framesSent,
      packetsSent: publisher.packetsSent,
      ...this.inbox.counts,
      dropped,
      queued: publisher.batcher.size,
      queuedBytes: publisher.batcher.bytes,
      journalBytes: publisher.log.bytes,
      unconfirmed: publisher.unconfirmed,
      reconnects: { consuming: this.receiver.connection.reconnects, publishing: connection.reconnects },
      lastError: this.reports.last,
    };
  }

  start(): void {
    if (this.#timers.length > 0) return;
    this.receiver.connection.start();
    this.sender.connection.start();
    this.#timers.push(
      setInterval(() => {
        this.sender.tick();
        for (const routes of this.#routes.values()) routes.tidy();
        void this.membership.beat();
      }, this.settings.heartbeatInterval),
      setInterval(() => this.membership.watch(), WATCH_INTERVAL),
    );
  }

  routes(nsp: string): Routes {
    let routes = this.#routes.get(nsp);
    if (routes) return routes;
    const [oldest = ""] = this.#routes.keys();
    if (this.tenants.size === 0 && this.#routes.size >= MAX_NAMESPACES) this.#routes.delete(oldest);
    this.#routes.set(
      nsp,
      (routes = new Routes(nsp, this.settings.socketRooms === "bound", () => this.sender.publisher.takesSince)),
    );
    return routes;
  }

  /** A namespace opens. The first one starts the connections. */
  join(tenant: Tenant): void {
    const { name } = tenant.nsp;
    // A server that closes begins with "/".
    const isClosing = this.closing || (name !== "/" && this.tenants.get("/")?.closing);
    if (isClosing) return tenant.opened.reject(new Error("The server has been closed"));
    const replaced = this.tenants.get(name);
    this.tenants.set(name, tenant);
    this.start();
    for (const key of replaced?.roomsByKey.keys() ?? []) void this.receiver.follow(key);
    void Promise.resolve(this.receiver.follow(tenant.key)).then(() => this.membership.announce());
  }

  /** A namespace closes. The last one closes the connections. */
  async leave(tenant: Tenant): Promise<void> {
    const { name } = tenant.nsp;
    tenant.opened.reject(new Error(`The adapter of ${name} was closed before it was ready`));
    if (this.tenants.get(name) !== tenant) return; // it has been replaced
    // A server that closes begins with "/", which goes last: until then no other namespace opens.
    if (name === "/") await Promise.all([...this.tenants.values()].map((other) => other !== tenant && other.closing));
    // Peers hear its answers, and it theirs, before it is closed for them.
    else await within(CLOSE_PATIENCE, Promise.all([this.sender.publisher.drained(), this.requests.answered(name)]));
    if (this.tenants.get(name) !== tenant) return; // it has been replaced meanwhile
    if (this.tenants.size > 1) {
      this.tenants.delete(name);
      this.#routes.delete(name);
      for (const key of [tenant.key, ...tenant.roomsByKey.keys()]) void this.receiver.follow(key);
      const announced = this.membership.announce();
      // The link may be dead. A server that closes says goodbye at once.
      if (!this.tenants.get("/")?.closing) await within(this.settings.requestsTimeout, announced);
      return;
    }
    await this.close(this.settings.requestsTimeout).catch((error) => this.reports.report(asError(error)));
    await null; // what was reported reaches its listeners
    this.tenants.delete(name);
  }

  /** Waits up to `ms` for the broker to confirm what was sent; rejects if it has not. Leaves nothing on the broker. */
  close(ms: number): Promise<void> {
    return (this.closing ??= this.#close(ms));
  }

  async #close(ms: number): Promise<void> {
    this.requests.close();
    const until = performance.now() + ms;
    const { dropped } = this.sender;
    await within(ms, this.sender.publisher.drained());
    await this.membership.reunited(until);
    const unconfirmed = await this.sender.close(until - performance.now());
    const left = unconfirmed + this.sender.dropped - dropped;
    this.#timers.forEach(clearInterval); // until here, what was missed is asked for
    // Rooms' exchanges that are not unbound in time go with the queue.
    const patience = left > 0 ? 0 : this.settings.requestsTimeout;
    await Promise.all([this.receiver.close(patience), this.sender.connection.close()]);
    this.opened.reject(new Error("Closed before it was ready"));
    if (left > 0) throw new Error(`Closed before the broker had confirmed ${left} packets`);
  }
}

// ── Receiving: one state per peer, of what has come, what is missing and what waits for it ───────────────────────────

/** While frames may be missing: those that come are held, and the peer is asked. */
interface CatchUp<F> {
  /** Tells one question from the next; the same one is asked again while there is no word of an answer. */
  readonly id: number;
  readonly held: Map<number, { readonly frame: F; readonly predecessors: readonly number[] }>;
  /** The bytes that were to be held; what goes beyond the limit is not, and the peer has to be asked once more. */
  bytes: number;
  /** The last number of the answer, once it has begun. */
  to?: number;
  /** For the owner: when to ask the peer (again). */
  askAt: number;
}

interface StreamEvents<F> {
  deliver(frame: F): void;
  /** A frame was delivered that had been missed, or held back while an earlier one was missing. */
  replayed(): void;
  duplicate(): void;
  /** Frames that did not come, and that the peer no longer has. */
  lost(frames: number): void;
}

/** The frames of one peer, in order and once each. No I/O: the owner asks the peer while `catchUp` is set. */
class PeerStream<F extends Frame> {
  /** Every frame up to this number has come, was for others, or is lost; undefined until the peer is heard. */
  cursor: number | undefined;
  /** The highest number that has come. */
  highest = 0;
  catchUp: CatchUp<F> | undefined;
  /** Numbers above the cursor that have come; those between were for others, or are missing. */
  readonly #come = new Set<number>();
  readonly #events: StreamEvents<F>;
  readonly #maxHeldBytes: number;
  #questions = 0;

  constructor(events: StreamEvents<F>, maxHeldBytes: number) {
    this.#events = events;
    this.#maxHeldBytes = maxHeldBytes;
  }

  /** Whether a frame that was published has not come, as far as is known. */
  readonly hasNot = (number: number): boolean => number > (this.cursor ?? 0) && !this.#come.has(number);

  /** A frame as it was published; `predecessors` are unconfirmed numbers before it that should have come to this queue. */
  receive(frame: F, predecessors: readonly number[] = []): void {
    const { number, floor } = frame;
    if (number === 0) {
      if (!this.catchUp) this.#events.deliver(frame);
      return;
    }
    if (!this.hasNot(number)) return this.#events.duplicate();
    const isMissing = this.cursor !== undefined && predecessors.some(this.hasNot);
    const catchUp = this.catchUp ?? (isMissing ? this.startCatchUp() : undefined);
    if (catchUp) return this.#hold(catchUp, frame, predecessors);
    this.cursor ??= number - 1;
    this.#deliver(frame);
    this.#skipTo(floor);
  }

  /** Frames may have been missed: during an outage, or a later frame names one that has not come. */
  startCatchUp(): CatchUp<F> {
    const { held = new Map(), bytes = 0 } = this.catchUp ?? {};
    return (this.catchUp = { id: ++this.#questions, held, bytes, askAt: 0 });
  }

  /** The peer says that it has published up to this number, of which all up to `floor` is confirmed. */
  hears(number: number, floor: number): void {
    if (this.catchUp) return;
    // Above what was ever published it is wrong, whoever is to blame. What has come may be newer than the message.
    this.cursor = Math.min(this.cursor ?? number, Math.max(number, this.highest));
    this.#skipTo(floor);
  }

  /** An answer begins: the frames from one number to another follow. */
  begin(from: number, to: number): void {
    const { catchUp } = this;
    if (!catchUp) return;
    const held = inOrder(catchUp.held);
    // Heard for the first time: what is missing before its first frame may have been published before this server came.
    this.cursor ??= Math.min(from, held[0]?.frame.number ?? from) - 1;
    // The peer no longer has those before. Some may have come meanwhile.
    for (const { frame } of held) if (frame.number < from) this.#deliverMissed(catchUp, frame);
    const lost = this.#countMissing(this.cursor, from - 1);
    if (lost > 0) this.#events.lost(lost);
    this.#skipTo(from - 1);
    catchUp.to = to;
    if (this.cursor >= to) this.#finish(catchUp);
  }

  /** A frame that the peer sends again. Returns false if one before it is missing, so that the peer has to be asked anew. */
  receiveAgain(frame: F): boolean {
    const { catchUp, cursor } = this;
    if (catchUp?.to === undefined || cursor === undefined || frame.number <= cursor) return true;
    if (frame.number > cursor + 1) return false;
    if (this.#come.has(frame.number)) this.#events.duplicate();
    else this.#deliverMissed(catchUp, frame);
    this.#skipTo(frame.number);
    if (frame.number >= catchUp.to) this.#finish(catchUp);
    return true;
  }

  /**
   * The peer cannot answer any more: what is held is delivered. Returns how many frames up to its last number, where that is
   * known, have not come.
   */
  giveUp(last?: number): number {
    const { catchUp, cursor } = this;
    if (!catchUp) return 0;
    const missing =
      last === undefined || cursor === undefined ? 0 : this.#countMissing(cursor, last) - catchUp.held.size;
    this.catchUp = undefined;
    for (const { frame } of inOrder(catchUp.held)) this.receive(frame);
    return Math.max(0, missing);
  }

  #hold(catchUp: CatchUp<F>, frame: F, predecessors: readonly number[]): void {
    if (catchUp.held.has(frame.number)) return this.#events.duplicate();
    catchUp.bytes += frame.body.length;
    if (catchUp.bytes <= this.#maxHeldBytes) catchUp.held.set(frame.number, { frame, predecessors });
  }

  /** Delivers a frame that was missed, in place of the one that is held. */
  #deliverMissed(catchUp: CatchUp<F>, frame: F): void {
    catchUp.held.delete(frame.number);
    this.#events.replayed();
    this.#deliver(frame);
  }

  /** All that was missed has come: what is held follows, and may show that more is missing. */
  #finish(catchUp: CatchUp<F>): void {
    this.catchUp = undefined;
    for (const { frame, predecessors } of inOrder(catchUp.held)) {
      if (!this.catchUp && this.hasNot(frame.number)) this.#events.replayed();
      this.receive(frame, predecessors);
    }
    if (catchUp.bytes > this.#maxHeldBytes) this.startCatchUp();
  }

  #deliver(frame: F): void {
    const { number } = frame;
    if (number === (this.cursor ?? 0) + 1) this.cursor = number;
    else this.#come.add(number);
    this.highest = Math.max(this.highest, number);
    this.#events.deliver(frame);
  }

  /** Nothing up to this number is waited for any more. */
  #skipTo(number: number): void {
    if (this.cursor === undefined || number <= this.cursor) return;
    this.cursor = number;
    for (const come of this.#come) {
      if (come > number) return;
      this.#come.delete(come);
    }
  }

  /** How many frames above one number, up to another, have not come. */
  #countMissing(after: number, last: number): number {
    let missing = Math.max(0, last - after);
    for (const number of this.#come) if (number > after && number <= last) missing--;
    return missing;
  }
}

const inOrder = <T extends { readonly frame: Frame }>(held: Map<number, T>): T[] =>
  [...held.values()].sort((one, other) => one.frame.number - other.frame.number);

// ── Sending: packets wait, are put into frames, and frames are kept until their journal forgets them ─────────────────

/** Where a packet goes. Made once for a room that is emitted to again and again. */
interface Destination {
  readonly nsp: string;
  readonly kind: SectionKind;
  /** Tells the receiver what the packet is for; what it says depends on the kind. */
  readonly head: string;
  /** Routing keys: one, or one for each of several rooms. */
  readonly keys: readonly string[];
  readonly volatile: boolean;
}

interface Waiting {
  readonly to: Destination;
  readonly parts: readonly Part[];
  /** Of its head and its parts. */
  readonly bytes: number;
  /** When it was emitted (ms, monotonic). */
  readonly at: number;
}

/** A frame takes packets up to about this many bytes. */
const FRAME_SIZE = 64 * 1024;
/** What a packet that waits costs beyond its head and parts, about (bytes). */
const WAITING_OVERHEAD = 160;
/** With at most this many other servers a frame takes any number of rooms; with many rooms it goes to everyone. */
const FEW_SERVERS = 8;
/**
 * With fewer keys than this, a frame for several rooms goes to those alone: few keys are cheap, and servers without these rooms
 * get nothing.
 */
const MANY_KEYS = 8;
/** How many routing keys a frame has at most. RabbitMQ looks each of them up: 16 cost 10,000 messages/s, 64 4,000/s. */
const MAX_KEYS = 64;

/** What decides how frames are routed. */
interface RoutingFacts {
  /** How many other servers have a namespace open. */
  servers(nsp: string): number;
  /** How many bytes several keys in one message may take; 0 where the broker would scan many bindings for them. */
  maxKeyBytes(): number;
}

/** Packets that wait to be put into frames, oldest first. They have no numbers yet, so one that is dropped leaves no hole. */
class Batcher {
  #packets: Waiting[] = [];
  /** Where the oldest one stands: to take each from the front of a long array would cost as much as all others. */
  #start = 0;
  /** The bytes of their heads and parts. */
  #content = 0;
  readonly #maxBytes: number;
  /** So far below `maxPayload` that multi-byte text does not reach it (bytes). */
  readonly #frameSize: number;
  readonly #facts: RoutingFacts;

  constructor(maxBytes: number, maxPayload: number, facts: RoutingFacts) {
    this.#maxBytes = maxBytes;
    this.#frameSize = Math.min(FRAME_SIZE, maxPayload / 8);
    this.#facts = facts;
  }

  get size(): number {
    return this.#packets.length - this.#start;
  }

  get bytes(): number {
    return this.#content + this.size * WAITING_OVERHEAD;
  }

  /** Returns how many of the oldest were dropped, for want of room. */
  add(packet: Waiting): number {
    this.#packets.push(packet);
    this.#content += packet.bytes;
    let dropped = 0;
    while (this.bytes > this.#maxBytes) for (const { to } of this.#shift(1)) dropped += Number(!to.volatile);
    return dropped;
  }

  /** Drops the packets that pass a test, and returns how many of them are not volatile. */
  drop(test: (packet: Waiting) => boolean): number {
    let dropped = 0;
    this.#packets = this.#packets.slice(this.#start).filter((packet) => {
      if (!test(packet)) return true;
      this.#content -= packet.bytes;
      dropped += Number(!packet.to.volatile);
      return false;
    });
    this.#start = 0;
    return dropped;
  }

  /** Whether a frame made now would be smaller than one made later. */
  get mayGrow(): boolean {
    const [first, last] = [this.#packets[this.#start], this.#packets.at(-1)];
    if (!first || !last || this.#content >= this.#frameSize) return false;
    return isSame(first.to, last.to) || (mayShare(first.to, last.to) && this.#maxKeys(first.to.nsp) > 1);
  }

  /** What the next frame is made of, where its first packet goes, and its routing keys; undefined if nothing waits. */
  next(): { to: Destination; packets: Waiting[]; keys: readonly string[] } | undefined {
    const to = this.#packets[this.#start]?.to;
    if (!to) return undefined;
    const keys = new Set(to.keys);
    const maxKeys = this.#maxKeys(to.nsp);
    let count = 0;
    let content = 0;
    let previous = to;
    for (let packet = this.#packets[this.#start]; packet; packet = this.#packets[this.#start + count]) {
      content += packet.bytes;
      if (content > this.#frameSize && count > 0) break;
      if (!isSame(packet.to, previous)) {
        previous = packet.to;
        if (!mayShare(previous, to) || keys.size + previous.keys.length > maxKeys) break;
        for (const key of previous.keys) keys.add(key);
      }
      count++;
    }
    return { to, packets: this.#shift(count), keys: this.#route(to, keys) };
  }

  /** Up to how many keys the packets of one frame may have, if they are not all for the same rooms. */
  #maxKeys(nsp: string): number {
    if (this.#facts.servers(nsp) <= FEW_SERVERS) return Infinity;
    return this.#facts.maxKeyBytes() > 0 ? MAX_KEYS : 1;
  }

  /** The keys that a frame takes, whose first packet has these: those of all its packets, or that of everyone. */
  #route({ nsp, keys: first }: Destination, keys: ReadonlySet<string>): readonly string[] {
    if (keys.size === 1) return [...keys];
    const everyone = [namespaceKey(nsp)];
    if (keys.size > first.length && keys.size >= Math.max(MANY_KEYS, this.#facts.servers(nsp))) return everyone;
    let bytes = 0;
    for (const key of keys) bytes += 5 + key.length * 3; // an entry of the `CC` header, at most
    return bytes <= this.#facts.maxKeyBytes() ? [...keys] : everyone;
  }

  /** Removes the oldest ones, and returns them. */
  #shift(count: number): Waiting[] {
    const oldest = this.#packets.slice(this.#start, this.#start + count);
    for (const { bytes } of oldest) this.#content -= bytes;
    this.#start += count;
    if (this.#start * 2 >= this.#packets.length) this.#start -= this.#packets.splice(0, this.#start).length;
    return oldest;
  }
}

const isSame = (a: Destination, b: Destination): boolean =>
  a === b ||
  (a.head === b.head &&
    a.kind === b.kind &&
    a.nsp === b.nsp &&
    a.volatile === b.volatile &&
    a.keys.length === b.keys.length &&
    a.keys.every((key, i) => key === b.keys[i]));

/** Whether packets for both may travel in one frame: the kinds up to options with one another, messages with messages. */
const mayShare = (a: Destination, b: Destination): boolean =>
  a.nsp === b.nsp &&
  a.volatile === b.volatile &&
  a.kind !== SectionKind.Direct &&
  Math.max(a.kind, SectionKind.Options) === Math.max(b.kind, SectionKind.Options);

/** Consecutive frames. */
interface Block {
  readonly buffer: Buffer;
  /** The number of its first frame. */
  readonly first: number;
  /** Of each frame: where it ends, and when it was made (ms, monotonic). */
  readonly ends: number[];
  readonly times: number[];
}

/**
 * Frames by their numbers, which follow one another. They stand in large blocks, for as objects some hundred thousand frames
 * would cost the garbage collector more than all else done with them.
 */
class FrameLog {
  /** The oldest number that is held, or the next one. */
  first = 1;
  next = 1;
  /** How many bytes the frames take. */
  bytes = 0;
  readonly #blocks: Block[] = [];
  /** The memory of a block that was forgotten: what is used again costs no page faults. */
  readonly #spare: Buffer[] = [];
  readonly #maxBytes: number;
  readonly #blockSize: number;

  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes;
    this.#blockSize = Math.min(512 * 1024, Math.ceil(maxBytes / 16)); // a larger frame has a block of its own
  }

  /** When a frame that is held was made (ms, monotonic). */
  timeOf(number: number): number | undefined {
    const block = this.#blockOf(number);
    return block?.times[number - block.first];
  }

  /** The number of the first frame that was made since a time (ms, monotonic), or the next one. */
  firstSince(time: number): number {
    let number = this.next;
    while ((this.timeOf(number - 1) ?? -Infinity) >= time) number--;
    return number;
  }

  /** Room for the frame with the next number. Numbers up to `floor` may be forgotten for it. */
  append(size: number, at: number, floor: number): Buffer {
    while (this.bytes + size > this.#maxBytes && this.first <= floor) this.forget();
    let block = this.#blocks.at(-1);
    let start = block?.ends.at(-1) ?? 0;
    if (!block || start + size > block.buffer.length) {
      const spare = size <= this.#blockSize ? this.#spare.pop() : undefined;
      const buffer = spare ?? Buffer.allocUnsafeSlow(Math.max(size, this.#blockSize));
      block = { buffer, first: this.next, ends: [], times: [] };
      start = 0;
      this.#blocks.push(block);
    }
    block.ends.push(start + size);
    block.times.push(at);
    this.bytes += size;
    this.next++;
    return block.buffer.subarray(start, start + size);
  }

  /** A frame that is held. Its bytes may be overwritten after the next `append()`. */
  get(number: number): Buffer | undefined {
    const block = this.#blockOf(number);
    if (!block) return undefined;
    const { ends, buffer, first } = block;
    const frame = buffer.subarray(ends[number - first - 1] ?? 0, ends[number - first]);
    return packetsIn(frame) > 0 ? frame : frame.subarray(0, HEADER + 4 * wordsIn(frame)); // withdrawn: shorter than its room
  }

  /** Forgets the oldest frame; with the last one of a block its memory. */
  forget(): void {
    const [block] = this.#blocks;
    if (!block) return;
    const index = this.first++ - block.first;
    this.bytes -= (block.ends[index] ?? 0) - (block.ends[index - 1] ?? 0);
    if (this.first < block.first + block.ends.length) return;
    this.#blocks.shift();
    if (block.buffer.length === this.#blockSize) this.#spare[0] = block.buffer;
  }

  #blockOf(number: number): Block | undefined {
    if (number < this.first || number >= this.next) return undefined;
    return this.#blocks.findLast(({ first }) => first <= number);
  }
}

/** A message for the publishing connection. */
interface Outgoing {
  keys: readonly string[];
  body: Buffer;
  /** For one server or for all: published to the second exchange, and returned if that one server has no queue. */
  readonly viaKeys: boolean;
  /** A frame that its receiver has asked for again. */
  readonly again?: boolean;
}
/** Refused: a queue is full or gone; the others have the message. Lost: nobody knows, for the connection is lost. */
type Outcome = "taken" | "refused" | "lost";
/** Publishes a message. Calls back later, or at once with `lost` where the channel has just closed. */
type Transmit = (message: Outgoing, confirmed: (outcome: Outcome) => void) => void;

/** A frame that the broker has not confirmed yet. */
interface Flight extends Outgoing {
  /** 0 if it is volatile. */
  readonly number: number;
  /** Of its routing keys, at most `MAX_DIGESTS`. */
  readonly digests: readonly number[];
}

interface PublisherEvents {
  /** So many packets were given up, if any: too many waited, or for too long. */
  dropped(packets: number): void;
  /** Runs `flush()` after so many ms, unless it is planned already; with 0 at the end of this turn of the event loop. */
  flushIn(ms: number): void;
}

/** While a frame is unconfirmed, one that may still grow leaves this many ms after it. */
const SPACING = 1;
/** From this many unconfirmed frames on, one that may still grow waits longer, and how long (ms): the broker is slow or far. */
const WINDOW = 8;
const STALLED_SPACING = 10;
/** How many bytes may be unconfirmed before the next frame waits. */
const IN_FLIGHT = 512 * 1024;
/** How many predecessors a frame names at most, and how many digests of them. */
const MAX_PREDECESSORS = 8;
const MAX_DIGESTS = 64;

/**
 * Makes frames of what waits, gives them numbers and publishes them. An idle server publishes at once; a busy one lets the next
 * frame grow while others are unconfirmed: Nagle's algorithm (RFC 896), with confirms for acknowledgements. No I/O of its own.
 */
class Publisher {
  framesSent = 0;
  packetsSent = 0;
  /** Since when the broker takes messages (ms, monotonic); undefined while it is away, or blocks for want of memory or disk. */
  takesSince: number | undefined;
  readonly log: FrameLog;
  readonly batcher: Batcher;
  readonly #uid: string;
  readonly #journalMs: number;
  readonly #events: PublisherEvents;
  readonly #now: () => number;
  #transmit: Transmit | undefined;
  /** In the order in which they were published. */
  #flights: Flight[] = [];
  #bytesInFlight = 0;
  #publishedAt = -Infinity;
  /** When the packets of this turn of the event loop are emitted (ms, monotonic); undefined until the first one. */
  #turnAt: number | undefined;
  readonly #onDrained: (() => void)[] = [];

  constructor(
    uid: string,
    { maxQueued, maxPayload, journal }: Pick<Settings, "maxQueued" | "maxPayload" | "journal">,
    facts: RoutingFacts,
    events: PublisherEvents,
    now: () => number = () => performance.now(),
  ) {
    this.#uid = uid;
    this.#journalMs = journal.ms;
    this.#events = events;
    this.#now = now;
    this.batcher = new Batcher(maxQueued, maxPayload, facts);
    this.log = new FrameLog(journal.bytes);
  }

  /** The number of the last frame that was published. */
  get number(): number {
    return this.log.next - 1;
  }

  /** Every number up to it is confirmed. */
  get floor(): number {
    return (this.#flights.find(({ number }) => number > 0)?.number ?? this.log.next) - 1;
  }

  get unconfirmed(): number {
    return this.#flights.length;
  }

  /** How many packets are not confirmed yet. */
  get unconfirmedPackets(): number {
    return this.#flights.reduce((sum, { body }) => sum + packetsIn(body), this.batcher.size);
  }

  /** Publishes what has not been confirmed once more, with its numbers, and then what waits. */
  up(transmit: Transmit): void {
    this.#transmit = transmit;
    this.takesSince = this.#now();
    this.#bytesInFlight = 0;
    const before = this.takesSince - this.#journalMs;
    for (const flight of this.#flights) {
      const at = this.log.timeOf(flight.number) ?? before;
      if (at < before) this.#events.dropped(this.#withdraw(flight)); // peers may have forgotten whether they have it
      this.#send(flight);
    }
    this.expire();
    this.flush();
  }

  /** The connection is lost. */
  down(): void {
    this.#transmit = undefined;
    this.takesSince = undefined;
    this.#flights = this.#flights.filter(({ number }) => number > 0);
    this.batcher.drop(({ to }) => to.volatile);
    this.#checkDrained();
  }

  block(blocked: boolean): void {
    this.takesSince = this.#transmit && !blocked ? this.#now() : undefined;
    this.flush();
  }

  /** A message that is no part of the stream: sent at once or not at all. Resolves with whether the broker has it. */
  sendNow(key: string, body: Buffer, again = false): Promise<boolean> {
    const transmit = this.#transmit;
    if (!transmit || this.takesSince === undefined) return Promise.resolve(false);
    return new Promise((resolve) =>
      transmit({ keys: [key], body, viaKeys: true, again }, (outcome) =>
        // What is for all servers is refused by full queues; the others have it.
        resolve(outcome === "taken" || (outcome === "refused" && key === ALL_SERVERS)),
      ),
    );
  }

  add(to: Destination, parts: readonly Part[], bytes: number): void {
    if (to.volatile && this.takesSince === undefined) return;
    if (this.#turnAt === undefined) {
      this.#turnAt = this.#now();
      this.#events.flushIn(0);
    }
    this.#events.dropped(this.batcher.add({ to, parts, bytes, at: this.#turnAt }));
  }

  readonly flush = (): void => {
    this.#turnAt = undefined;
    while (this.takesSince !== undefined && this.#bytesInFlight < IN_FLIGHT && this.batcher.size > 0) {
      if (this.#flights.length > 0 && this.batcher.mayGrow) {
        const spacing = this.#flights.length < WINDOW ? SPACING : STALLED_SPACING;
        const wait = this.#publishedAt + spacing - this.#now();
        if (wait > 0) return this.#events.flushIn(wait);
      }
      this.#publish();
    }
  };

  /** Forgets what is older than the journal keeps it; packets that wait only while the broker is away. */
  expire(): void {
    const { log, floor } = this;
    const before = this.#now() - this.#journalMs;
    while (log.first <= floor && (log.timeOf(log.first) ?? before) < before) log.forget();
    if (this.takesSince !== undefined) return;
    this.#events.dropped(this.batcher.drop(({ at }) => at < before));
    this.#checkDrained();
  }

  /** Resolves once all that was added is confirmed. */
  drained(): Promise<void> {
    return new Promise((resolve) => {
      this.#onDrained.push(resolve);
      this.#checkDrained();
    });
  }

  /** The broker has refused a frame as too large: the largest that is unconfirmed is given up. Returns its size and packets. */
  giveUpLargest(): { size: number; packets: number } | undefined {
    const sizeOf = ({ body, keys }: Flight) => body.length + keys.join().length;
    const [largest] = this.#flights.toSorted((a, b) => sizeOf(b) - sizeOf(a));
    return largest && { size: sizeOf(largest), packets: this.#withdraw(largest) };
  }

  /** Takes a frame's packets away, in the log too, and returns how many. Its number stays, so nobody misses it. */
  #withdraw(flight: Flight): number {
    const { body, keys, number } = flight;
    const packets = packetsIn(body);
    flight.body = writeFrame((size) => body.subarray(0, size), this.#uid, number, this.floor, [], []);
    flight.keys = keys.slice(0, 1);
    return packets;
  }

  #publish(): void {
    const batch = this.batcher.next();
    if (!batch) return;
    const { to, packets, keys } = batch;
    const number = to.volatile ? 0 : this.log.next;
    const allocate = (size: number) =>
      to.volatile ? Buffer.allocUnsafe(size) : this.log.append(size, this.#now(), this.floor);
    const predecessors = to.volatile ? [] : predecessorsIn(this.#flights, number);
    const body = writeFrame(allocate, this.#uid, number, this.floor, packets, predecessors);
    const digests = keys.slice(0, MAX_DIGESTS).map(digestOf);
    const flight: Flight = { number, keys, body, digests, viaKeys: to.kind === SectionKind.Direct };
    this.#flights.push(flight);
    this.packetsSent += packets.length;
    this.#send(flight);
  }

  #send(flight: Flight): void {
    const transmit = this.#transmit;
    this.#bytesInFlight += flight.body.length;
    this.#publishedAt = this.#now();
    this.framesSent++;
    transmit?.(flight, (outcome) => {
      // What is refused is not sent again: others have it, and a server whose queue was gone asks when it is back.
      if (outcome === "lost" || transmit !== this.#transmit) return;
      this.#flights.splice(this.#flights.indexOf(flight), 1);
      this.#bytesInFlight -= flight.body.length;
      this.#checkDrained();
      this.flush();
    });
  }

  #checkDrained(): void {
    if (this.#flights.length + this.batcher.size > 0) return;
    for (const resolve of this.#onDrained.splice(0)) resolve();
  }
}

/** Unconfirmed frames before the one with this number: how many numbers back each is, and the digest of each of its keys. */
function predecessorsIn(flights: readonly Flight[], next: number): number[] {
  const predecessors: number[] = [];
  let count = 0;
  for (let i = flights.length - 1; i >= 0 && count < MAX_PREDECESSORS; i--) {
    const { number, digests } = flights[i]!;
    if (number === 0) continue;
    count++;
    for (const digest of digests) predecessors.push(next - number, digest);
  }
  return predecessors.slice(0, 2 * MAX_DIGESTS);
}

/**
 * A routing key's digest; one pair of keys in 2^31 has the same. An even number for the keys of servers, odd for all others:
 * what is for one server does not go through the main exchange, so a queue that gets everything does not get it.
 */
const digestOf = (key: string): number => ((Bun.hash.crc32(key) | 1) >>> 0) - Number(key.startsWith(ALL_SERVERS));

/** How many destinations are kept ready for packets that go there again, and how long their heads may be. */
const MAX_ROUTES = 65_536;
const MAX_HEAD = 255;
/** For how many ms after the broker took a join of others' sockets the room's packets go to everyone: they must bind it first. */
const JOINED_FROM_AFAR = 10_000;

/** Which routing keys the packets and messages of a namespace take. */
class Routes {
  readonly nsp: string;
  readonly #socketRooms: boolean;
  readonly #takesSince: () => number | undefined;
  readonly #everyone: Destination;
  readonly #messages: Destination;
  /** By their heads, for packets to one room and for those with options. */
  readonly #toRooms = new Map<string, Destination>();
  readonly #toOptions = new Map<string, Destination>();
  /** Rooms that sockets of other servers were made to join, and when (ms, monotonic). */
  readonly #fromAfar = new Map<Room, number>();

  /**
   * `socketRooms`: whether rooms named like a socket id have a key of their own. `takesSince`: since when the broker takes messages
   * (ms, monotonic).
   */
  constructor(nsp: string, socketRooms: boolean, takesSince: () => number | undefined = () => 0) {
    this.nsp = nsp;
    this.#socketRooms = socketRooms;
    this.#takesSince = takesSince;
    this.#everyone = { nsp, kind: SectionKind.Everyone, head: "", keys: [namespaceKey(nsp)], volatile: false };
    this.#messages = { ...this.#everyone, kind: SectionKind.Messages };
  }

  /** Whether a room has a routing key of its own; the packets for others go to everyone. */
  hasKey(room: Room): boolean {
    return this.#socketRooms || !isSocketId(room);
  }

  packets({ rooms, except, flags = {} }: BroadcastOptions): Destination {
    const [room] = rooms;
    const hasOptions = rooms.size > 1 || except?.size || flags.volatile !== undefined || flags.compress !== undefined;
    if (rooms.size === 0 && !hasOptions) return this.#everyone;
    // Users pass `undefined` for a room as well, and half of an emoji, which UTF-8 does not hold, but JSON does.
    const isRoom = !hasOptions && typeof room === "string" && room.isWellFormed();
    const head = isRoom ? room : JSON.stringify([sentRooms(rooms), sentRooms(except ?? []), sentFlags(flags)]);
    const ready = isRoom ? this.#toRooms : this.#toOptions;
    const known = ready.get(head);
    if (known) return known;
    const kind = isRoom ? SectionKind.Room : SectionKind.Options;
    const destination = { ...this.#everyone, kind, head, keys: this.#keys(rooms), volatile: Boolean(flags.volatile) };
    if (head.length > MAX_HEAD || rooms.values().some((room) => this.#fromAfar.has(room))) return destination;
    if (ready.size >= (isRoom ? MAX_ROUTES : MAX_HEADS)) ready.clear();
    ready.set(head, destination);
    return destination;
  }

  /** What an emitter's event without a parser of its own, and what is asked of servers, goes by. */
  message(message: Message): Destination {
    if (message.type !== "packet") return this.#messages;
    const { rooms, flags } = message.opts;
    return { ...this.#messages, keys: this.#keys(rooms), volatile: Boolean(flags.volatile) };
  }

  /** To one server. */
  direct(uid: string): Destination {
    return { ...this.#messages, kind: SectionKind.Direct, head: uid, keys: [serverKey(uid)] };
  }

  /** Every `heartbeatInterval`: forgets the destinations. Many may be of rooms that nobody uses again; the others are soon back. */
  tidy(): void {
    this.#toRooms.clear();
    this.#toOptions.clear();
  }

  /** Other servers' sockets are made to join these rooms. */
  joinFromAfar(rooms: Room[]): void {
    for (const room of this.#fromAfar.keys()) if (this.#isFromAfar(room)) break; // removes the oldest, which stand first
    this.#toOptions.clear();
    for (const room of rooms) {
      this.#toRooms.delete(room);
      this.#fromAfar.delete(room);
      this.#fromAfar.set(room, performance.now());
    }
  }

  /** Forgets a room that has been bound in the meantime. */
  #isFromAfar(room: Room): boolean {
    const joinedAt = this.#fromAfar.get(room);
    if (joinedAt === undefined) return false;
    const takenAt = Math.max(joinedAt, this.#takesSince() ?? Infinity); // at the latest
    if (takenAt + JOINED_FROM_AFAR > performance.now()) return true;
    this.#fromAfar.delete(room);
    return false;
  }

  #keys(rooms: Iterable<Room>): readonly string[] {
    const keys = new Set<string>();
    for (const room of rooms) {
      if (this.#isFromAfar(room) || !this.hasKey(room)) return this.#everyone.keys;
      keys.add(roomKey(this.nsp, room));
    }
    return keys.size === 0 ? this.#everyone.keys : [...keys];
  }
}

// ── Bindings: what is bound follows the rooms ────────────────────────────────────────────────────────────────────────

/** How a queue gets what is published under a routing key: by a binding, or through an exchange of the room's own. */
type Way = "key" | "exchange";

/** Something to do on the broker: to bind or unbind a key, or to bind it once more. */
interface BindingChange {
  readonly key: string;
  readonly from: Way | undefined;
  readonly to: Way | undefined;
}

/** Stands for all routing keys: a binding to the main exchange. */
const EVERYTHING = "";
/** For how many ms a frame may be under way that was routed before a key was bound. */
const UNDER_WAY = 2_000;
/** With more bindings to make than this, the queue gets everything until they are made, for then joins need not wait. */
const STORM = 32;
/**
 * A server with more rooms than this gives none an exchange. When a queue goes, RabbitMQ deletes its auto-delete exchanges in
 * one transaction, in a time that grows with their number and with that of all bindings; publishers wait meanwhile. Measured
 * with 3.10: 250 rooms take 1 s, 2,000 take 168 s, 100 rooms of 10,000 take 9 s; 10,000 rooms without exchanges take 0.7 s.
 */
const MAX_ROOM_EXCHANGES = 100;

/** The routing keys of one queue: those that the rooms want, those that the broker has, and what to do next. No I/O. */
class Bindings {
  /** Bound keys. One that is being unbound is none of them. A new queue gets everything. */
  readonly bound = new Map<string, Way>([[EVERYTHING, "key"]]);
  readonly #tenants: Context["tenants"];
  #mayHaveExchanges: boolean;
  /** Since when the queue has got what is published under a key, by its digest (ms, monotonic). */
  readonly #gotSince: Map<number, number>;
  /** Keys to bind, to unbind, and to bind once more, until that is done. Nobody waits for the last two. */
  readonly #joins = new Set<string>();
  readonly #leaves = new Set<string>();
  readonly #renewals = new Set<string>();
  /** Keys for which something is being done. */
  readonly #busy = new Set<string>();
  /** Joins that wait until their key is live. */
  readonly #waiting = new Map<string, PromiseWithResolvers<void>>();
  #ended = false;

  constructor(tenants: Context["tenants"], mayHaveExchanges: boolean, ownKeys: string[]) {
    this.#tenants = tenants;
    this.#mayHaveExchanges = mayHaveExchanges;
    this.#gotSince = new Map([EVERYTHING, ...ownKeys].map((key) => [digestOf(key), -Infinity]));
  }

  /** Whether the queue gets what is published under this key, and what is for everyone in its namespace. */
  isLive(key: string): boolean {
    const { bound } = this;
    return bound.has(EVERYTHING) || (bound.has(key) && bound.has(this.#namespaceKey(key)));
  }

  /**
   * Whether a frame under a key, by its digest, that was unconfirmed a moment ago must have come to the queue. Not just after the
   * key was bound: it may have been routed before, and a client that joins a room gets no earlier packets.
   */
  expects(digest: number): boolean {
    const everythingSince = digest % 2 === 0 ? Infinity : this.#everythingSince;
    const since = Math.min(this.#gotSince.get(digest) ?? Infinity, everythingSince);
    return performance.now() - since > UNDER_WAY;
  }

  /** A key may have to be bound or unbound. The promise resolves when one that is wanted is live. */
  reconcile(key: string): Promise<void> | undefined {
    const wanted = this.#wants(key);
    if (wanted !== this.bound.get(key)) (wanted ? this.#joins : this.#leaves).add(key);
    const waiting = this.#waiting.get(key);
    if (!wanted || this.#ended || this.isLive(key)) {
      waiting?.resolve();
      this.#waiting.delete(key);
      return undefined;
    }
    const join = waiting ?? Promise.withResolvers<void>();
    this.#waiting.set(key, join);
    return join.promise;
  }

  reconcileAll(): void {
    for (const tenant of this.#tenants.values())
      for (const key of [tenant.key, ...tenant.roomsByKey.keys()]) void this.reconcile(key);
    for (const key of this.bound.keys()) void this.reconcile(key);
  }

  /** What to do next, if anything. `done()` follows. */
  next(): BindingChange | undefined {
    const rooms = this.bound.size + this.#joins.size - this.#tenants.size - Number(this.bound.has(EVERYTHING));
    if (this.#mayHaveExchanges && rooms > MAX_ROOM_EXCHANGES) {
      this.#mayHaveExchanges = false;
      this.reconcileAll();
    }
    const change = this.#begin(EVERYTHING) ?? this.#beginOneOf(this.#joins) ?? this.#beginOneOf(this.#leaves);
    // Everything once more: the joins that it was for may no longer be wanted.
    return change ?? this.#beginOneOf(this.#renewals) ?? this.#begin(EVERYTHING);
  }

  done({ key, to }: BindingChange): void {
    for (const keys of [this.#busy, this.#joins, this.#leaves, this.#renewals]) keys.delete(key);
    if (to) {
      this.bound.set(key, to);
      const digest = digestOf(key);
      if (!this.#gotSince.has(digest)) this.#gotSince.set(digest, Math.min(performance.now(), this.#everythingSince));
    }
    void this.reconcile(key);
    if (this.#namespaceKey(key) !== key) return;
    for (const room of this.#waiting.keys()) void this.reconcile(room); // they wait for their namespace as well
  }

  /** Rooms' exchanges may have gone: they are bound once more. */
  renew(): void {
    for (const key of this.viaExchange()) this.#renewals.add(key);
  }

  get isBusy(): boolean {
    return this.#busy.size > 0;
  }

  /** Bound keys that lead through an exchange of their own. */
  viaExchange(): string[] {
    return [...this.bound].flatMap(([key, way]) => (way === "exchange" ? [key] : []));
  }

  /** The queue goes: nobody waits for it, nothing more is bound, and only the rooms' exchanges are unbound. */
  end(): void {
    this.#ended = true;
    for (const key of [...this.#waiting.keys(), ...this.viaExchange()]) void this.reconcile(key);
  }

  get #everythingSince(): number {
    return this.#gotSince.get(digestOf(EVERYTHING)) ?? Infinity;
  }

  #beginOneOf(keys: Set<string>): BindingChange | undefined {
    for (const key of keys) {
      const change = this.#begin(key, keys === this.#renewals);
      if (change) return change;
      if (!this.#busy.has(key)) keys.delete(key);
    }
    return undefined;
  }

  #begin(key: string, renews = false): BindingChange | undefined {
    const [from, to] = [this.bound.get(key), this.#wants(key)];
    if (this.#busy.has(key) || (from === to && !(renews && to === "exchange"))) return undefined;
    if (!to) {
      this.bound.delete(key);
      this.#gotSince.delete(digestOf(key));
    }
    this.#busy.add(key);
    return { key, from, to };
  }

  #wants(key: string): Way | undefined {
    const way = this.bound.get(key);
    if (this.#ended) return way === "exchange" ? undefined : way;
    if (key === EVERYTHING) return this.#joins.size > (way ? 0 : STORM) ? "key" : undefined;
    const tenant = this.#tenantOf(key);
    if (tenant?.key === key) return "key";
    if (!tenant?.roomsByKey.has(key)) return undefined;
    return this.#mayHaveExchanges ? "exchange" : "key";
  }

  /** The key of the namespace that a room's key belongs to; of others, the key itself. */
  #namespaceKey(key: string): string {
    return this.#tenantOf(key)?.key ?? key;
  }

  #tenantOf(key: string): Tenant | undefined {
    if (!key.startsWith(HASHED)) return this.#tenants.get(namespaceOf(key));
    return this.#tenants.values().find((tenant) => tenant.key === key || tenant.roomsByKey.has(key));
  }
}

/** What is refused until somebody changes something: it is tried again less often. */
class Refusal extends Error {}

/**
 * In Khepri, an auto-delete exchange that is unbound while somebody else binds it destroys the metadata. RabbitMQ 4.0 and 4.1
 * use Khepri if told to, and lose connections then (541); later versions always use it, and lose the virtual host.
 */
const MAY_USE_KHEPRI = "4.0.0";
const USES_KHEPRI = "4.2.0";

/** @throws Refusal if room exchanges are asked for where they would destroy the broker */
function mayHaveRoomExchanges(model: AmqpConnection, wanted: boolean | undefined): boolean {
  const { brokerVersion: version } = internals(model);
  const isBelow = (limit: string) => Bun.semver.order(version, limit) < 0;
  if (wanted && !isBelow(USES_KHEPRI))
    throw new Refusal(
      `roomExchanges: true was refused: the broker's version is ${version}, and from RabbitMQ 4.2 on exchanges that come and go ` +
        "with their bindings destroy its metadata store; leave roomExchanges out, and bind to the routing keys of rooms instead",
    );
  return wanted ?? isBelow(MAY_USE_KHEPRI);
}

/** amqplib keeps one operation in flight on each channel, so more of them bind faster. */
const LANES = 3;
/** How long the removal of this server's last queue is waited for, in ms. */
const REMOVAL_PATIENCE = 10_000;
/** How often an operation is tried that meets an exchange which another server's last leave has just deleted. */
const ATTEMPTS = 20;

const DURABLE: Options.AssertExchange = { durable: true };
const TRANSIENT: Options.AssertExchange = { durable: false, autoDelete: true };

/** The two exchanges that stay. */
async function declare(channel: Channel, { mainExchange, keyExchange }: Names): Promise<void> {
  await channel.assertExchange(mainExchange, "fanout", DURABLE);
  await channel.assertExchange(keyExchange, "direct", DURABLE);
  await channel.bindExchange(keyExchange, mainExchange, "");
}

/** One queue on one connection, and the loop that binds and unbinds until what is bound is what is wanted. */
class Topology {
  readonly bindings: Bindings;
  readonly #model: AmqpConnection;
  readonly #lose: Lose;
  readonly #context: Context;
  readonly #generation: number;
  readonly #unbound: Set<string>;
  readonly #queue: string;
  /** Channels for bindings alone that have nothing to do: a refused operation closes its channel. */
  readonly #idle: Channel[] = [];
  #ended = false;

  /** `generation`: how many queues this server has had. @throws Refusal */
  constructor(model: AmqpConnection, lose: Lose, context: Context, generation: number, unbound: Set<string>) {
    const { uid, names, settings, tenants } = context;
    this.#model = model;
    this.#lose = lose;
    this.#context = context;
    this.#generation = generation;
    this.#unbound = unbound;
    this.#queue = names.queue(uid, generation);
    this.bindings = new Bindings(tenants, mayHaveRoomExchanges(model, settings.roomExchanges), ownKeys(uid));
  }

  /**
   * Makes the queue, which gets everything from here on. Rooms are bound once the one before is gone, for RabbitMQ begins its
   * removal again and again while others bind: measured with 3.10 and 10,000 bindings, it takes 0.7 s alone and did not end
   * while four channels bound.
   */
  async open(receive: (message: ConsumeMessage) => void): Promise<void> {
    const [model, lose, queue] = [this.#model, this.#lose, this.#queue];
    const { uid, names, settings } = this.#context;
    await this.#deleteUnbound();
    const lanes = await Promise.all(Array.from({ length: LANES }, () => openLane(model)));
    const channel = watchChannel(await model.createChannel(), lose);
    const exclusive = { exclusive: true, durable: false, arguments: settings.queueArguments };
    const [lane = channel] = lanes;
    await Promise.all([declare(lane, names), channel.assertQueue(queue, exclusive)]);
    await Promise.all([
      lane.bindQueue(queue, names.keyExchange, ALL_SERVERS),
      channel.bindQueue(queue, names.mainExchange, EVERYTHING),
    ]);
    const onMessage = (message: ConsumeMessage | null) => {
      if (!message) lose(new Error(`The queue ${queue} was deleted`));
      else if (!this.#ended) receive(message);
    };
    // Its own key last: Khepri confirms a binding that other nodes of the cluster may make later, but in the same order. So a peer
    // whose answer comes here by this key publishes on a node that has made the others too.
    const own = lane.bindQueue(queue, names.keyExchange, serverKey(uid));
    await Promise.all([own, channel.consume(queue, onMessage, { noAck: true })]);
    const gone = this.#generation === 1 ? Promise.resolve() : removed(model, names.queue(uid, this.#generation - 1));
    gone.then(() => {
      this.bindings.reconcileAll();
      this.#idle.push(...lanes);
      this.#work();
    }, lose);
  }

  /** The queue is given up: what it still delivers would come out of order. */
  end(): void {
    this.#ended = true;
    this.bindings.end();
  }

  follow(key: string): Promise<void> | undefined {
    const live = this.bindings.reconcile(key);
    this.#work();
    return live;
  }

  /** Binds the rooms' exchanges once more after a queue has gone: the broker may delete one with it just as it is bound. */
  renew(): void {
    this.bindings.renew();
    this.#work();
  }

  /** Unbinds the rooms' exchanges one by one. With the queue they would go in one transaction, for which all others wait. */
  async close(): Promise<void> {
    this.bindings.end();
    this.#work();
    while (this.bindings.isBusy && !this.#ended) await Bun.sleep(5);
  }

  /** Exchanges that the last connection declared and could not bind: the broker deletes none that was never bound. */
  async #deleteUnbound(): Promise<void> {
    for (const exchange of this.#unbound) {
      const deletion = alone(this.#model, (lane) => lane.deleteExchange(exchange, { ifUnused: true }));
      await deletion.catch((error: BrokerError) => {
        if (error.code === undefined) throw error; // else refused: somebody has bound it meanwhile, or it is not ours
      });
      this.#unbound.delete(exchange);
    }
  }

  /** Binds and unbinds, one change after the other on each channel, until there is nothing left to do. */
  #work(): void {
    for (const lane of this.#idle.splice(0)) {
      const change = this.#ended ? undefined : this.bindings.next();
      if (change) this.#change(lane, change).catch(this.#lose);
      else this.#idle.push(lane);
    }
  }

  /** Where an exchange has vanished between two steps (404), tries again on a new channel. */
  async #change(lane: Channel, change: BindingChange, attempt = 1): Promise<void> {
    try {
      await this.#tryChange(lane, change);
    } catch (error) {
      const { code, name } = error as BrokerError;
      const isGone = code === 404 || name === "IllegalOperationError";
      if (isGone && attempt < ATTEMPTS && !this.#ended)
        return this.#change(await openLane(this.#model), change, attempt + 1);
      throw error;
    }
    this.bindings.done(change);
    this.#idle.push(lane);
    this.#work();
  }

  async #tryChange(lane: Channel, { key, from, to }: BindingChange): Promise<void> {
    const [queue, { names }] = [this.#queue, this.#context];
    const source = key === EVERYTHING ? names.mainExchange : names.keyExchange;
    const exchange = names.roomExchange(key);
    if (to === "exchange") {
      this.#unbound.add(exchange);
      await lane.assertExchange(exchange, "fanout", TRANSIENT);
      await lane.bindQueue(queue, exchange, ""); // first the queue, which keeps the exchange alive
      this.#unbound.delete(exchange);
      await lane.bindExchange(exchange, source, key);
    } else if (to === "key") await lane.bindQueue(queue, source, key);
    if (from === to) return;
    // The queue gets one copy, whatever the ways. The last one to unbind deletes the room's exchange.
    if (from === "exchange") await lane.unbindQueue(queue, exchange, "");
    else if (from === "key") await lane.unbindQueue(queue, source, key);
  }
}

/** Waits, within bounds, until the broker has removed a queue. */
async function removed(model: AmqpConnection, queue: string): Promise<void> {
  for (const until = performance.now() + REMOVAL_PATIENCE; performance.now() < until; await Bun.sleep(50)) {
    try {
      await alone(model, (lane) => lane.checkQueue(queue));
    } catch (error) {
      const { code } = error as BrokerError;
      if (code === 404) return;
      if (code !== 405) throw error; // 405: somebody's exclusive queue, still
    }
  }
}

/** An operation on a channel of its own, which the broker closes if it refuses. */
async function alone(model: AmqpConnection, operate: (channel: Channel) => Promise<unknown>): Promise<void> {
  const channel = await openLane(model);
  await operate(channel);
  await channel.close();
}

async function openLane(model: AmqpConnection): Promise<Channel> {
  const channel = await model.createChannel();
  channel.on("error", (error) => debug("topology: %s", error.message)); // reported by the operation that fails
  return channel;
}

// ── Connections ──────────────────────────────────────────────────────────────────────────────────────────────────────

interface ConnectionEvents {
  /** Does all that a new connection needs. Resolves with a function that takes the connection into use. */
  up(model: AmqpConnection, lose: Lose): Promise<() => void>;
  down(error: Error): void;
}
type Lose = (error: Error) => void;
type Timeout = ReturnType<typeof setTimeout>;

/** Delays between attempts, in ms: doubled up to the limit, with jitter. */
const BACKOFF = { first: 100, limit: 1_000, refused: 10_000 };
/** A connection that has lasted this long (ms) starts the back-off anew. */
const STABLE = 5_000;
/** How long amqpConnection may take, in ms. */
const CONNECT_PATIENCE = 10_000;
/** How long an answer to a goodbye is waited for, in ms: a dead link gives none. */
const CLOSE_PATIENCE = 1_000;

/** Connections that have been returned before: a function that returns one again is told so. */
const used = new WeakSet<AmqpConnection>();

/** Keeps one connection up until it is closed. */
class Connection {
  /** Since when the connection is up (ms, monotonic); undefined while it is not. */
  upSince: number | undefined;
  /** How many times it has come up again. */
  reconnects = 0;
  readonly #name: string;
  readonly #context: Context;
  readonly #events: ConnectionEvents;
  #closed = false;
  /** Ends what the loop waits for. */
  #interrupt: Lose | undefined;
  #running: Promise<void> | undefined;

  constructor(name: string, context: Context, events: ConnectionEvents) {
    this.#name = name;
    this.#context = context;
    this.#events = events;
  }

  start(): void {
    this.#running = this.#run();
  }

  /** Gives the connection up for a new one. */
  lose(error: Error): void {
    this.#interrupt?.(error);
  }

  async close(): Promise<void> {
    this.#closed = true;
    this.lose(new Error("closed"));
    await this.#running;
  }

  async #run(): Promise<void> {
    const { reports, settings } = this.#context;
    let reported: string | undefined;
    let delayMs = 0;
    let times = 0;
    for (let attempt = 0; !this.#closed; attempt++) {
      const { promise: ended, reject: lose } = Promise.withResolvers<never>();
      this.#interrupt = lose;
      let model: AmqpConnection | undefined;
      try {
        if (attempt > 0) await within(delayMs, ended);
        model = await this.#open(ended);
        watchConnection(model, lose);
        const use = await Promise.race([this.#events.up(model, lose), ended]);
        use();
        this.upSince = performance.now();
        this.reconnects = times++;
        reported = undefined;
        this.#context.changed("connect", this.#name);
        await ended;
      } catch (reason) {
        const error = asError(reason);
        if (this.upSince !== undefined && !this.#closed) {
          if (performance.now() - this.upSince > STABLE) attempt = 0;
          this.#context.changed("disconnect", this.#name);
        }
        const what = `The ${this.#name} connection ${this.upSince === undefined ? "could not be opened" : "was lost"}`;
        this.upSince = undefined;
        this.#events.down(error);
        if (model) await closeConnection(model);
        // Once per outage, unless there is news.
        if (!this.#closed && kindOf(error) !== reported) reports.report(explain(error, what, settings.prefix));
        reported = kindOf(error);
        delayMs = backoff(attempt, error);
      }
    }
  }

  /** A connection that does not come in time, or before `close()`, is closed if it comes later. */
  async #open(ended: Promise<never>): Promise<AmqpConnection> {
    const opening = this.#connect();
    const model = await within(CONNECT_PATIENCE, Promise.race([opening, ended.catch(() => undefined)]));
    if (model) return model;
    opening.then(closeConnection).catch(() => {}); // nobody waits for it any more
    throw new Error(`amqpConnection did not connect within ${CONNECT_PATIENCE} ms`);
  }

  async #connect(): Promise<AmqpConnection> {
    const model = await this.#context.settings.amqpConnection();
    if (typeof model?.createConfirmChannel !== "function" || typeof model.close !== "function")
      throw new TypeError(`amqpConnection returned ${Bun.inspect(model)}, not what amqplib's connect() returns`);
    if ("waitForConnect" in model) {
      await closeConnection(model);
      throw new Refusal(
        "amqpConnection uses amqplib's recovery: leave it out, for the adapter opens new connections itself",
      );
    }
    if (used.has(model))
      throw new TypeError(
        "amqpConnection returned a connection that is in use: return a new connection from each call",
      );
    used.add(model);
    return model;
  }
}

/** Hears of the connection's end. The listeners stay: amqplib throws an error that nobody listens for. */
function watchConnection(model: AmqpConnection, lose: Lose): void {
  model.on("error", lose).on("close", (error?: Error) => lose(error ?? new Error("Connection closed")));
  // amqplib leaves Nagle's algorithm on, which holds a small message back for up to 40 ms while another is under way, and
  // does not look at the socket's own "close".
  const { stream } = internals(model);
  stream?.setNoDelay?.(true);
  stream?.once?.("close", () => queueMicrotask(() => lose(new Error("Socket closed"))));
}

/** Closes what `amqpConnection` returned. */
async function closeConnection(model: AmqpConnection): Promise<void> {
  const ignore = (error: unknown) => debug("close: %s", asError(error).message);
  model.on("error", ignore); // one that came too late has no listener yet
  const closed = (async () => model.close())(); // amqplib's interface with callbacks returns no promise
  await within(CLOSE_PATIENCE, closed.catch(ignore));
  internals(model).stream?.destroy?.(); // over a dead link it would keep the process alive until a heartbeat is missed
}

/** What a promise resolves to, or undefined after `ms`. */
async function within<T>(ms: number, promise: Promise<T>): Promise<T | undefined> {
  let timer: Timeout | undefined;
  const late = new Promise<undefined>(
    (resolve) => (timer = setTimeout(() => resolve(undefined), Math.min(Math.max(0, ms), MAX_TIMEOUT))),
  );
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** What amqplib leaves out of the types of its connections. */
function internals(model: AmqpConnection) {
  type Internals = { frameMax?: number; serverProperties?: { version?: unknown }; stream?: Partial<TcpSocket> };
  const { frameMax, serverProperties, stream } = (model as { connection?: Internals }).connection ?? {};
  const [version = "0.0.0"] = /^\d+\.\d+\.\d+/.exec(`${serverProperties?.version}.0`) ?? [];
  return { frameMax: frameMax ?? 4_096, brokerVersion: version, stream }; // AMQP 0-9-1 allows at least 4,096 bytes
}

function backoff(attempt: number, error: Error): number {
  const isRefused = error instanceof Refusal || /ACCESS.REFUSED/.test(error.message);
  const limit = isRefused ? BACKOFF.refused : BACKOFF.limit;
  return Math.min(limit, BACKOFF.first * 2 ** attempt) * (0.5 + Math.random() / 2);
}

/** What amqplib adds to an error by which the broker closed a channel. */
type BrokerError = Error & { code?: number; classId?: number };

/** Says what to do about errors that do not say so. */
function explain(error: Error, what: string, prefix: string): Error {
  const pattern = `^${prefix.replace(/[^\w-]/g, "\\$&")}(#|$)`;
  const advice: [RegExp, string][] = [
    [/No channels left/, `; allow at least ${LANES + 2} channels: channelMax of the URL, or channel_max of the broker`],
    [/Expected ConnectionOpenOk/, "; create the virtual host that the URL names, and give the user permissions in it"],
    [/inequivalent arg/, "; somebody else declared it in another way: delete it, or choose another prefix"],
    [/access to .* refused/, `; grant the user configure, write and read permission on ${pattern}`],
  ];
  const [, todo = ""] = advice.find(([symptom]) => symptom.test(error.message)) ?? [];
  return new Error(`${what}: ${error.message}${todo}`, { cause: error });
}

/** An error's message without numbers and what is quoted, which change with each attempt; but with what the broker says. */
const kindOf = (error: Error): string => error.message.replace(/'[^']*'|(?<!message )"(?:[^"\\]|\\.)*"|\d+/g, "");

/** A channel that goes down with its connection, and takes it down. */
function watchChannel<C extends Channel>(channel: C, lose: Lose): C {
  channel.on("error", lose);
  // A connection closes its channels first, and then says why.
  channel.on("close", () => queueMicrotask(() => lose(new Error("Channel closed"))));
  return channel;
}

// ── The wire: frames, each an AMQP message with packets for one namespace ────────────────────────────────────────────
//
//  0       1       2         10       16      22      24        28        32
//  ┌───────┬───────┬─────────┬────────┬───────┬───────┬─────────┬─────────┬───────────┬──────┬──────────┐
//  │version│ kind  │ sender  │ number │ floor │ 0     │ n words │ packets │ n × word  │ text │ binaries │
//  │ 2     │ u8    │ 8 ASCII │ u48    │ u48   │ u16   │ u32     │ u32     │ u32       │ UTF-8│          │
//  └───────┴───────┴─────────┴────────┴───────┴───────┴─────────┴─────────┴───────────┴──────┴──────────┘
//
// All numbers are little-endian. The words: the namespace's length, the number of sections, the number of predecessors; of each
// section its kind and eight times its head's length, and how many parts it has; of each predecessor how many numbers back it
// is, and the digest of its routing key; of each part its length, with a bit for a binary and one for a packet that has more
// parts. Lengths are in UTF-16 code units, those of binaries in bytes. The text is the namespace, the heads and then all parts
// that are strings, so it is decoded with one call. A control frame has no words; its text is JSON.

const FrameKind = { Packets: 1, Control: 2 } as const;

/** Who the packets of a section are for, and what its head says. */
const SectionKind = {
  /** Everyone in the namespace; no head. */
  Everyone: 0,
  /** One room, which the head names. */
  Room: 1,
  /** The head is the JSON of [rooms, except, flags]. */
  Options: 2,
  /** `Message`s between servers, each a packet; no head. */
  Messages: 3,
  /** The same, for one server, which the head names: a replay brings it to others too. */
  Direct: 4,
} as const;
type SectionKind = (typeof SectionKind)[keyof typeof SectionKind];

type Part = string | Uint8Array;

const VERSION = 2;
const HEADER = 32;
/** The offsets of a frame's floor, of how many words and of how many packets it has. */
const FLOOR = 16;
const WORDS = 24;
const PACKETS = 28;
const BINARY = 2 ** 31;
const MORE_PARTS = 2 ** 30;
const MAX_PART = MORE_PARTS - 1;

/** A message that cannot be read: malformed, or not ours. */
class FrameError extends Error {}
class UnknownVersion extends FrameError {}

interface Frame {
  readonly kind: number;
  readonly sender: string;
  /** 0 for one that is volatile. */
  readonly number: number;
  readonly floor: number;
  readonly packets: number;
  readonly body: Buffer;
}

/** Writes a frame into a buffer that `allocate` gives. Packets for the same rooms make one section. */
function writeFrame(
  allocate: (size: number) => Buffer,
  sender: string,
  number: number,
  floor: number,
  packets: readonly Pick<Waiting, "to" | "parts">[],
  predecessors: readonly number[],
): Buffer {
  const nsp = packets[0]?.to.nsp ?? "";
  const sections: number[] = [];
  const lengths: number[] = [];
  const binaries: Uint8Array[] = [];
  let heads = nsp;
  let text = "";
  let section: Destination | undefined;
  for (const { to, parts } of packets) {
    if (!section || !isSame(to, section)) {
      section = to;
      heads += to.head;
      sections.push(to.kind + to.head.length * 8, 0);
    }
    sections[sections.length - 1]! += parts.length;
    for (const part of parts) {
      lengths.push(part.length + MORE_PARTS + (typeof part === "string" ? 0 : BINARY));
      if (typeof part === "string") text += part;
      else binaries.push(part);
    }
    lengths[lengths.length - 1]! -= MORE_PARTS;
  }
  const words = [nsp.length, sections.length / 2, predecessors.length / 2].concat(sections, predecessors, lengths);
  const header = { kind: FrameKind.Packets, sender, number, floor, packets: packets.length };
  return assemble(allocate, header, words, heads + text, binaries);
}

function controlFrame(sender: string, control: Control): Buffer {
  const header = { kind: FrameKind.Control, sender, number: 0, floor: 0, packets: 0 };
  return assemble((size) => Buffer.allocUnsafe(size), header, [], JSON.stringify(control), []);
}

function assemble(
  allocate: (size: number) => Buffer,
  { kind, sender, number, floor, packets }: Omit<Frame, "body">,
  words: number[],
  text: string,
  binaries: Uint8Array[],
): Buffer {
  let offset = HEADER + 4 * words.length;
  const size = binaries.reduce((sum, { length }) => sum + length, offset + Buffer.byteLength(text));
  const frame = allocate(size);
  frame[0] = VERSION;
  frame[1] = kind;
  frame.write(sender, 2, "latin1");
  frame.writeUIntLE(number, 10, 6);
  frame.writeUIntLE(floor, FLOOR, 6);
  frame.writeUInt16LE(0, 22);
  frame.writeUInt32LE(words.length, WORDS);
  frame.writeUInt32LE(packets, PACKETS);
  frame.set(new Uint8Array(new Uint32Array(words).buffer), HEADER);
  offset += frame.write(text, offset);
  for (const binary of binaries) {
    frame.set(binary, offset);
    offset += binary.length;
  }
  return frame;
}

/** The header. What follows it is read when somebody wants it. */
function readFrame(body: Buffer): Frame {
  const [version = 0, kind] = body;
  if (version === 0 || version >= 0x20 || body.length < HEADER)
    throw new FrameError(`neither a frame nor of content type application/json (${body.length} bytes)`);
  const sender = body.toString("latin1", 2, 10);
  if (version !== VERSION) {
    const why = `this adapter reads version ${VERSION}: update the older servers`;
    throw new UnknownVersion(`a frame of version ${version} from server ${sender}; ${why}`);
  }
  const words = wordsIn(body);
  if (kind !== FrameKind.Control && (kind !== FrameKind.Packets || words < 3 || HEADER + 4 * words > body.length))
    throw new FrameError(`a frame of kind ${kind} with ${words} words in ${body.length} bytes`);
  const number = body.readUIntLE(10, 6);
  const floor = body.readUIntLE(FLOOR, 6);
  return { kind, sender, number, floor, packets: packetsIn(body), body };
}

const wordsIn = (frame: Buffer): number => frame.readUInt32LE(WORDS);
const packetsIn = (frame: Buffer): number => frame.readUInt32LE(PACKETS);
const wordAt = (body: Buffer, index: number): number => body.readUInt32LE(HEADER + 4 * index);

/** The numbers of a frame's predecessors that have not come, and whose routing key passes a test. */
function predecessorsOf(
  { number, body }: Frame,
  isExpected: (digest: number) => boolean,
  hasNot: (number: number) => boolean,
): readonly number[] {
  const numbers: number[] = [];
  const start = 3 + 2 * wordAt(body, 1);
  const end = Math.min(start + 2 * wordAt(body, 2), wordsIn(body));
  for (let i = start; i < end; i += 2) {
    const before = number - wordAt(body, i);
    if (hasNot(before) && isExpected(wordAt(body, i + 1))) numbers.push(before);
  }
  return numbers;
}

function checkSize({ length }: Buffer, { maxPayload }: Settings): void {
  if (length > maxPayload) throw new FrameError(`a message of ${length} bytes; maxPayload is ${maxPayload} bytes`);
}

/** The packets of a frame for the same rooms. */
interface Section {
  readonly kind: number;
  readonly head: string;
  /** How many packets stand before it. */
  readonly first: number;
  /** The frame's body and text, and where this section's parts stand among the words, in the text, and among the binaries. */
  readonly body: Buffer;
  readonly text: string;
  readonly word: number;
  readonly parts: number;
  readonly textAt: number;
  readonly binaryAt: number;
}

/** Takes apart what follows a frame's header, but for the packets, which not every server wants. */
function readSections({ body }: Frame): { nsp: string; sections: Section[] } {
  const words = wordsIn(body);
  const sectionsEnd = 3 + 2 * wordAt(body, 1);
  // Where the next part stands: among the words, in the text, and among the binaries.
  let word = sectionsEnd + 2 * wordAt(body, 2);
  if (word > words) throw new FrameError(`a frame of ${words} words, of which sections take ${word}`);
  let textAt = wordAt(body, 0);
  let binaryAt = body.length;
  for (let i = 3; i < sectionsEnd; i += 2) textAt += wordAt(body, i) >>> 3;
  for (let i = word; i < words; i++) if (wordAt(body, i) >= BINARY) binaryAt -= wordAt(body, i) & MAX_PART;
  const text = body.toString("utf8", HEADER + 4 * words, binaryAt);
  const sections: Section[] = [];
  let headAt = wordAt(body, 0);
  let first = 0;
  for (let i = 3; i < sectionsEnd; i += 2) {
    const kindAndHead = wordAt(body, i);
    const parts = wordAt(body, i + 1);
    if (parts > words - word) throw new FrameError(`a section of ${parts} parts in ${words} words`);
    const head = text.slice(headAt, (headAt += kindAndHead >>> 3));
    sections.push({ kind: kindAndHead & 7, head, first, body, text, word, parts, textAt, binaryAt });
    for (const end = word + parts; word < end; word++) {
      const part = wordAt(body, word);
      if ((part & MORE_PARTS) === 0) first++;
      if (part >= BINARY) binaryAt += part & MAX_PART;
      else textAt += part & MAX_PART;
    }
  }
  if (textAt !== text.length || binaryAt !== body.length || word !== words)
    throw new FrameError("a frame whose parts do not fill it");
  return { nsp: text.slice(0, wordAt(body, 0)), sections };
}

/** The packets of a section, each with its parts. */
function takePackets({ body, text, word, parts, textAt, binaryAt }: Section): Part[][] {
  const packets: Part[][] = [];
  let packet: Part[] = [];
  for (let i = word; i < word + parts; i++) {
    const part = wordAt(body, i);
    const length = part & MAX_PART;
    if (part >= BINARY) packet.push(body.subarray(binaryAt, (binaryAt += length)));
    else packet.push(text.substring(textAt, (textAt += length)));
    if ((part & MORE_PARTS) !== 0) continue;
    packets.push(packet);
    packet = [];
  }
  return packets;
}

/** The same string, without the frame's text of which it is a part: JavaScriptCore would keep that as long as the part. */
const detached = <T>(part: T): T | string =>
  typeof part === "string" ? Buffer.from(part, "utf16le").toString("utf16le") : part;

/** Heads come again and again: parsed once. */
const parsedHeads = new Map<string, Required<BroadcastOptions>>();
const MAX_HEADS = 16_384;

function parseHead(text: string): Required<BroadcastOptions> {
  const known = parsedHeads.get(text);
  if (known) return known;
  const value = parseJson(text);
  const [rooms, except, flags] = isList(value) ? value : [];
  const opts = { rooms, except, flags };
  if (!isLike(opts, OPTIONS)) throw new FrameError("a section whose head is not [rooms, except, flags]");
  const head = fromWire(opts);
  if (parsedHeads.size >= MAX_HEADS) parsedHeads.clear();
  if (text.length < 1_024) parsedHeads.set(detached(text), head);
  return head;
}

// ── Values: JSON with binary at any depth ────────────────────────────────────────────────────────────────────────────

interface WireOptions {
  rooms: Room[];
  except: Room[];
  flags: BroadcastFlags;
}

/** What of the flags matters elsewhere. */
const sentFlags = ({ volatile, compress }: BroadcastFlags = {}): BroadcastFlags => ({
  ...(volatile !== undefined && { volatile }),
  ...(compress !== undefined && { compress }),
});

/** What servers and emitters tell each other about a namespace. */
type Message =
  | { type: "packet"; opts: WireOptions; data: unknown[] }
  | { type: "join" | "leave"; opts: WireOptions; rooms: Room[] }
  | { type: "disconnect"; opts: WireOptions; close: boolean }
  | { type: "emit"; id?: string | undefined; args: unknown[] }
  | { type: "fetch"; id: string; opts: WireOptions }
  /** Of sessions: asks for one, or for all; takes them over; offers its own. */
  | { type: "find"; id: string; pid?: string | undefined; offset?: string | undefined }
  | { type: "claim"; id: string; pids: string[]; offset?: string | undefined }
  | { type: "offer"; id: string }
  /** The event is encoded by the sender's parser. */
  | { type: "broadcast"; id: string; opts: WireOptions; timeout: number; packet: Part[] }
  | Answer;
type Answer =
  /** A part of a list. */
  | { type: "items"; id: string; items: unknown[]; more: boolean }
  | { type: "answer"; id: string; value?: unknown }
  /** A client's answer, encoded by the server's parser; without a packet if it could not be. */
  | { type: "ack"; id: string; packet?: Part[] | undefined }
  | { type: "clients"; id: string; count: number };

/** When the namespaces were announced, the last number that was published, and the one up to which all is confirmed. */
type Progress = Record<"revision" | "number" | "floor", number>;

/** What servers and emitters tell each other about themselves. */
type Control =
  /** What is open, and what was published; `reply` asks for the same. */
  | ({ type: "hello"; namespaces: string[]; shared: Shared; reply: boolean } & Progress)
  /** Alive, with so many bound keys. */
  | ({ type: "beat"; bindings: number } & Progress)
  /** Closing, after that number. */
  | { type: "bye"; number: number }
  /** Returned by the broker if there is no queue; else answered with a beat. */
  | { type: "ping" }
  /** Asks for the frames after a number, or, where none is known, for those of so many ms. */
  | { type: "ask"; id: number; after?: number | undefined; ms?: number | undefined }
  /** The answer: the frames from one number to another follow, each as it was published. */
  | { type: "begin"; id: number; from: number; to: number };

const isList = (value: unknown): value is unknown[] => Array.isArray(value);

/** Whether a value has the fields of a sample, with values of the same types; numbers are integers from 0 on. */
function isLike<T>(value: unknown, sample: T): value is T {
  if (isList(sample)) return isList(value);
  if (typeof sample === "number") return Number.isSafeInteger(value) && Number(value) >= 0;
  if (!isRecord(sample)) return typeof value === typeof sample;
  return isRecord(value) && Object.entries(sample).every(([field, like]) => isLike(value[field], like));
}

/** What each message has at least. */
const OPTIONS: WireOptions = { rooms: [], except: [], flags: {} };
const MESSAGES: Record<Message["type"], object> = {
  packet: { opts: OPTIONS, data: [] },
  join: { opts: OPTIONS, rooms: [] },
  leave: { opts: OPTIONS, rooms: [] },
  disconnect: { opts: OPTIONS },
  emit: { args: [] },
  fetch: { id: "", opts: OPTIONS },
  find: { id: "" },
  claim: { id: "", pids: [] },
  offer: { id: "" },
  broadcast: { id: "", opts: OPTIONS, packet: [] },
  items: { id: "", items: [] },
  answer: { id: "" },
  ack: { id: "" },
  clients: { id: "", count: 0 },
};
const PROGRESS: Progress = { revision: 0, number: 0, floor: 0 };
const CONTROLS: Record<Control["type"], object> = {
  hello: { namespaces: [], shared: {}, ...PROGRESS },
  beat: { bindings: 0, ...PROGRESS },
  bye: { number: 0 },
  ping: {},
  ask: { id: 0 },
  begin: { id: 0, from: 0, to: 0 },
};

function verified<T extends { type: string }>(samples: Record<T["type"], object>, value: unknown): T {
  const type = isRecord(value) && value["type"];
  if (typeof type === "string" && Object.hasOwn(samples, type) && isLike(value, samples[type as T["type"]]))
    return value as T;
  throw new FrameError(`a message that is none of ${Object.keys(samples).join(", ")}`);
}

const readMessage = (parts: Part[]): Message => verified<Message>(MESSAGES, decodeValue(parts));
const readControl = ({ body }: Frame): Control => verified<Control>(CONTROLS, parseJson(body.toString("utf8", HEADER)));

/** JSON, with binary replaced by placeholders as the Socket.IO protocol has them, and the binaries after it. */
function encodeValue(value: unknown): Part[] {
  const binaries: Uint8Array[] = [];
  const json = JSON.stringify(value, function (this: Record<string, unknown>, key, replaced: unknown) {
    const binary = asBinary(this[key]); // the value before Buffer's toJSON
    return binary ? { _placeholder: true, num: binaries.push(binary) - 1 } : replaced;
  });
  return [json ?? "null", ...binaries]; // `undefined` and functions give no JSON
}

function decodeValue([json, ...binaries]: Part[]): unknown {
  if (binaries.length === 0) return parseJson(json);
  return parseJson(json, (_, value) => {
    if (!isRecord(value) || value["_placeholder"] !== true || typeof value["num"] !== "number") return value;
    return binaries[value["num"]] ?? value;
  });
}

function parseJson(text: unknown, revive?: (key: string, value: unknown) => unknown): unknown {
  if (typeof text !== "string") throw new FrameError("binary where JSON was expected");
  try {
    return JSON.parse(text, revive);
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

/** A part that the parser has encoded; a binary as a copy, for the user may reuse it. */
function partOf(part: unknown): Part {
  if (typeof part === "string") return part;
  const binary = asBinary(part);
  if (binary) return Buffer.from(binary);
  throw new TypeError(
    `Cannot send ${Bun.inspect(part)} to other servers; expected a string, a buffer or a typed array`,
  );
}

const asParts = (parts: readonly unknown[]): readonly Part[] =>
  parts.every((part) => typeof part === "string") ? parts : parts.map(partOf);

function toWire({ rooms, except, flags }: BroadcastOptions): WireOptions {
  return { rooms: sentRooms(rooms), except: sentRooms(except ?? []), flags: sentFlags(flags) };
}

/** Users and messages name rooms that are neither strings nor numbers as well: `null` stands for them. */
const sentRooms = (rooms: Iterable<Room | null>): Room[] =>
  Array.from(rooms, (room) => (typeof room === "string" || typeof room === "number" ? room : null) as Room);

function fromWire({ rooms, except, flags }: WireOptions): Required<BroadcastOptions> {
  return { rooms: new Set(rooms), except: new Set(except), flags };
}

function asError(error: unknown): Error {
  // A host name with several addresses, none of which answers, gives one error without a message.
  if (error instanceof AggregateError && !error.message)
    return new Error(error.errors.map((each) => asError(each).message).join("; "), { cause: error });
  return error instanceof Error ? error : new Error(String(error));
}

// ── Names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Routing keys: `/chat` is everyone in a namespace, `/chat#room42` a room, `@` all servers, `@<uid>` one server. */
const ALL_SERVERS = "@";
const serverKey = (uid: string): string => `${ALL_SERVERS}${uid}`;
const ownKeys = (uid: string): string[] => [ALL_SERVERS, serverKey(uid)];
/** How a key or name begins that would have been too long: its SHA-256 follows. No other key begins like this. */
const HASHED = "%";
/** AMQP 0-9-1: names and routing keys are short strings. */
const MAX_NAME_BYTES = 255;

const isShort = (name: string): boolean =>
  name.length * 3 <= MAX_NAME_BYTES || Buffer.byteLength(name) <= MAX_NAME_BYTES;
const hashed = (key: string): string => `${HASHED}${createHash("sha256").update(key).digest("hex")}`;
const short = (key: string): string => (isShort(key) ? key : hashed(key));
/** `#` and `%` are escaped, or namespace `/a#b` would claim the key of room `b` in `/a`. */
const escaped = (nsp: string): string => nsp.replaceAll("%", "%25").replaceAll("#", "%23");
/** The namespace of a key that is not hashed. */
const namespaceOf = (key: string): string => key.replace(/#.*/s, "").replaceAll("%23", "#").replaceAll("%25", "%");
const namespaceKey = (nsp: string): string => short(escaped(nsp));
const roomKey = (nsp: string, room: Room): string => short(`${escaped(nsp)}#${room}`.toWellFormed());

const isSocketId = (room: Room): boolean => typeof room === "string" && room.length === 20 && /^[\w-]+$/.test(room);

class Names {
  /** Everybody publishes to this exchange, which bears the prefix as its name. */
  readonly mainExchange: string;
  /** Behind it: queues are bound to it by routing key. */
  readonly keyExchange: string;

  constructor(prefix: string) {
    this.mainExchange = prefix;
    this.keyExchange = `${prefix}#keys`;
  }

  roomExchange(key: string): string {
    const name = `${this.mainExchange}#${key}`;
    // RabbitMQ leaves line ends out of the names of exchanges, but not of routing keys.
    return isShort(name) && !/[\r\n]/.test(name) ? name : `${this.mainExchange}#${hashed(key)}`;
  }

  queue(uid: string, generation: number): string {
    return `${this.mainExchange}#@${uid}.${generation}`;
  }
}
