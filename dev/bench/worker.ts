/** A process of the benchmark: one server of a cluster, or a thousand WebSocket clients. It does what bench.ts asks over IPC. */
import type { AddressInfo } from "node:net";
import { SAMPLES, SLOTS, type Answer, type Call, type Start } from "./cluster.ts";
import { openMember, SocketServer, type Payload } from "./transports.ts";

export interface Body {
  bytes: number;
  binary?: boolean;
}

export interface Load {
  /** What is emitted to in turn: a room, or several at once. */
  rooms: (string | string[])[];
  body: Body;
  /** Packets per turn of the event loop. */
  burst: number;
  /** For how long, in ms. */
  ms: number;
  /** Which slots count them, and how many times each packet is received in all. */
  slots: number[];
  copies: number;
  /** How many packets may be under way, so that no adapter is measured while it fills memory. */
  window: number;
}

export interface Pace {
  room: string;
  body: Body;
  /** Packets per second, and how many. */
  rate: number;
  count: number;
  slots: number[];
}

const { place, shared, slot } = JSON.parse(process.argv[2] ?? "") as Start;
const counters = new Float64Array(Bun.mmap(shared, { shared: true }).buffer);
const sentAt = counters.subarray(SLOTS, SLOTS + SAMPLES);
const receivedAt = counters.subarray(SLOTS + SAMPLES);
/** The clock of all processes on this machine, in ms. */
const now = (): number => performance.timeOrigin + performance.now();

let received = 0;
/** The count at which the times of packets are written down from; Infinity while they are not. */
let recording = Infinity;
let operations = 0;
let messages = 0;
let emitting: Timer | undefined;
/** Rooms of which no packet has come since the connection was cut. */
const silent = new Set<string>();

const member = await openMember(place, {
  operation: () => operations++,
  message: () => messages++,
  packet(text) {
    if (silent.size > 0) silent.delete(/"([^"]*)"\]$/.exec(text)?.[1] ?? "");
    if (received >= recording) receivedAt[received - recording] = now();
    counters[slot] = ++received;
  },
});

function socketServer(): SocketServer {
  if (member instanceof SocketServer) return member;
  throw new Error(`${place.transport} has no clients`);
}

const payloadOf = ({ bytes, binary }: Body): Payload => (binary ? Buffer.alloc(bytes, 1) : "x".repeat(bytes));
const total = (slots: number[]): number => slots.reduce((sum, slot) => sum + (counters[slot] ?? 0), 0);

async function drained(slots: number[], count: number): Promise<void> {
  const missing = await missed(slots, count, 10_000);
  if (missing > 0) throw new Error(`${missing} packets did not arrive`);
}

/** Waits until so many packets have come, or none for so many ms. Gives how many are missing. */
async function missed(slots: number[], count: number, patience: number): Promise<number> {
  for (let last = total(slots), since = now(); last < count;) {
    await Bun.sleep(1);
    const current = total(slots);
    if (current !== last) since = now();
    last = current;
    if (now() - since > patience) return count - current;
  }
  return 0;
}

const commands = {
  /** Connects a client that is in these rooms. Gives how long the joins took, in ms. */
  join: (rooms: string[]) => member.join(rooms),

  connectAndDisconnect: async (clients: number): Promise<void> => {
    for (let i = 0; i < clients; i++) await socketServer().connect();
    await Bun.sleep(200);
    socketServer().disconnect();
  },

  async openNamespaces(count: number): Promise<void> {
    for (let i = 0; i < count; i++) socketServer().io.of(`/namespace${i}`);
    await member.ready();
  },

  /** Emits until one packet has come through. */
  async probe(room: string, slots: number[]): Promise<void> {
    for (const before = total(slots); total(slots) === before; await Bun.sleep(20)) member.emit(room, "probe");
    for (let last = -1; last !== total(slots); await Bun.sleep(100)) last = total(slots);
  },

  /** Emits as fast as the cluster takes it; what was sent and how long it took until all was received. */
  async saturate({ rooms, body, burst, ms, slots, copies, window }: Load): Promise<{ packets: number; ms: number }> {
    const payload = payloadOf(body);
    const base = total(slots);
    const start = now();
    let sent = 0;
    while (now() - start < ms) {
      for (let i = 0; i < burst; i++) member.emit(rooms[sent++ % rooms.length] ?? "", payload);
      await new Promise(setImmediate);
      while (sent - (total(slots) - base) / copies > window) await Bun.sleep(1);
    }
    await drained(slots, base + sent * copies);
    return { packets: sent, ms: now() - start };
  },

  /**
   * Emits so many packets without a pause, whatever becomes of them: how long the loop took and, from its start, until the last
   * one was received, in ms, and how many did not come.
   */
  async loop({ rooms, body, slots }: Load, count: number): Promise<{ emitted: number; ms: number; lost: number }> {
    const payload = payloadOf(body);
    const base = total(slots);
    const patience = 3_000;
    const start = now();
    for (let i = 0; i < count; i++) member.emit(rooms[i % rooms.length] ?? "", payload);
    const emitted = now() - start;
    const lost = await missed(slots, base + count, patience);
    return { emitted, ms: now() - start - (lost > 0 ? patience : 0), lost };
  },

  /** Emits one packet to each room. Gives how many did not come. */
  async emitEach(rooms: string[], slots: number[]): Promise<number> {
    const base = total(slots);
    for (const room of rooms) member.emit(room, room);
    return missed(slots, base + rooms.length, 2_000);
  },

  /** Emits each room's name to it, one every ms, until there are none. */
  emitNames(rooms: string[]): void {
    clearInterval(emitting);
    let i = 0;
    const emit = (room = "") => member.emit(room, room);
    if (rooms.length > 0) emitting = setInterval(() => emit(rooms[i++ % rooms.length]), 1);
  },

  /** For how many ms from now on a packet of one of these rooms is still to come. */
  async heard(rooms: string[], patience: number): Promise<number> {
    for (const room of rooms) silent.add(room);
    const start = now();
    while (silent.size > 0 && now() - start < patience) await Bun.sleep(1);
    if (silent.size > 0) throw new Error(`nothing came of ${silent.size} of ${rooms.length} rooms`);
    return now() - start;
  },

  /** Emits at a steady pace and writes down when. */
  async pace({ room, body, rate, count, slots }: Pace): Promise<void> {
    const payload = payloadOf(body);
    const base = total(slots);
    const start = now();
    for (let sent = 0; sent < count; await Bun.sleep(1)) {
      for (const due = Math.min(count, ((now() - start) * rate) / 1000); sent < due; sent++) {
        sentAt[sent] = now();
        member.emit(room, payload);
      }
    }
    await drained(slots, base + count);
  },

  record: (on: boolean): void => void (recording = on ? received : Infinity),

  async emit(room: string, body: Body, count: number): Promise<void> {
    const payload = payloadOf(body);
    for (let i = 0; i < count; i++) {
      member.emit(room, payload);
      if (i % 100 === 99) await new Promise(setImmediate);
    }
  },

  operations: (): number => operations,

  /** How many messages have come from the broker. */
  messages: (): number => messages,

  /** In µs. */
  cpu(): number {
    const { user, system } = process.cpuUsage();
    return user + system;
  },

  /** In bytes. */
  heap(): number {
    Bun.gc(true);
    Bun.gc(true);
    return process.memoryUsage().heapUsed;
  },

  /** In bytes: what the process holds of the machine's memory, after a collection. */
  memory(): number {
    Bun.gc(true);
    Bun.gc(true);
    return process.memoryUsage.rss();
  },

  /** How many rooms are bound on the broker. */
  bound: (): number => socketServer().bound,

  /** Waits for the loss of the connection, and gives the ms from there until so many rooms are bound again. */
  async rebound(rooms: number): Promise<number> {
    const server = socketServer();
    while (server.bound >= rooms) await Bun.sleep(1);
    const start = now();
    for (const limit = start + 60_000; server.bound < rooms; await Bun.sleep(5))
      if (now() > limit) throw new Error(`${server.bound} of ${rooms} rooms bound after 60 s`);
    return now() - start;
  },

  /** Serves real clients, all in one room. Gives the port. */
  async listen(room: string): Promise<number> {
    const { io, http } = socketServer();
    io.on("connection", (socket) => void socket.join(room));
    await new Promise<void>((resolve) => http.listen(0, "127.0.0.1", resolve));
    return (http.address() as AddressInfo).port;
  },

  /** Connects WebSocket clients, which count the events they get. */
  async connectClients(port: number, count: number): Promise<void> {
    const url = `ws://127.0.0.1:${port}/socket.io/?EIO=4&transport=websocket`;
    const connect = () =>
      new Promise<void>((resolve, reject) => {
        const socket = new WebSocket(url);
        socket.onerror = () => reject(new Error(`cannot connect to ${url}`));
        socket.onmessage = ({ data }) => {
          const packet = String(data);
          if (packet.startsWith("42")) counters[slot] = ++received;
          else if (packet.startsWith("40")) resolve();
          else if (packet.startsWith("0")) socket.send("40");
          else if (packet === "2") socket.send("3");
        };
      });
    for (let i = 0; i < count; i += 50) await Promise.all(Array.from({ length: 50 }, connect));
  },
};
export type Commands = typeof commands;

process.on("disconnect", () => process.exit());
process.on("message", async ({ id, command, args }: Call) => {
  try {
    const run = commands[command] as (...args: unknown[]) => unknown;
    process.send?.({ id, result: await run(...args) } satisfies Answer);
  } catch (error) {
    process.send?.({ id, error: String(error) } satisfies Answer);
  }
});
process.send?.({ id: 0 } satisfies Answer);
