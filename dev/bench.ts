/**
 * How fast the adapter is, beside its peers: `bun run bench`. Every case is run in turn over all transports, several times,
 * and the median counts; machines differ and are noisy, so what is worth reading is the ratio within one run.
 */
import { cpus } from "node:os";
import { parseArgs } from "node:util";
import { Cluster, cpuOf, startRedis, type Worker } from "./bench/cluster.ts";
import { chart, judge, summarise, table, targetTable, type Figure, type Target } from "./bench/report.ts";
import { TRANSPORTS, type Place, type Transport } from "./bench/transports.ts";
import type { Load } from "./bench/worker.ts";
import { startBroker } from "./broker.ts";

const USAGE = `bun run bench [options]
  --quick            about two minutes instead of fifteen
  --rounds N         how often each case is run
  --cases a,b        only these
  --transports a,b   only these
  --json FILE        writes all figures
  --svg FILE         draws the most important ones`;

// ── What is measured ─────────────────────────────────────────────────────────────────────────────────────────────────

const FIGURES = {
  bursts: { title: "one room, 100 emits per turn", unit: "/s" },
  tens: { title: "one room, 10 emits per turn", unit: "/s" },
  single: { title: "one room, one emit per turn", unit: "/s" },
  kilobyte: { title: "1 KB, 100 per turn", unit: "/s" },
  binary: { title: "binary attachment, 100 per turn", unit: "/s" },
  rooms: { title: "1,000 rooms in turn, 100 per turn", unit: "/s" },
  senderCpu: { title: "CPU per packet: sender", unit: "µs" },
  receiverCpu: { title: "CPU per packet: receiver", unit: "µs" },
  bystanderCpu: { title: "CPU per packet: server without the room", unit: "µs" },
  brokerCpu: { title: "CPU per packet: broker", unit: "µs" },
  p50at500: { title: "latency at 500/s: p50", unit: "ms" },
  p99at500: { title: "latency at 500/s: p99", unit: "ms" },
  p50at20000: { title: "latency at 20,000/s: p50", unit: "ms" },
  p99at20000: { title: "latency at 20,000/s: p99", unit: "ms" },
  joins: { title: "first joins", unit: "/s" },
  joinOperations: { title: "broker operations per first join", unit: "" },
  clientOperations: { title: "broker operations per client that comes and goes", unit: "" },
  rebound: { title: "10,000 rooms bound again after a reconnect", unit: "s" },
  roomHeap: { title: "heap per room beyond in memory", unit: "B" },
  queueHeap: { title: "heap of 10,000 queued packets", unit: "MB" },
  idle: { title: "idle messages per server and heartbeat, 1,000 namespaces", unit: "" },
  servers2: { title: "2 servers, room on two", unit: "/s" },
  servers4: { title: "4 servers, room on two", unit: "/s" },
  servers8: { title: "8 servers, room on two", unit: "/s" },
  servers2Cpu: { title: "2 servers: CPU per emit, all servers and broker", unit: "µs" },
  servers4Cpu: { title: "4 servers: CPU per emit", unit: "µs" },
  servers8Cpu: { title: "8 servers: CPU per emit", unit: "µs" },
  fanout: { title: "to 1,000 WebSocket clients on two servers, deliveries", unit: "/s" },
} satisfies Record<string, Figure>;
type FigureName = keyof typeof FIGURES;
type Measured = Partial<Record<FigureName, number>>;

const TARGETS: Target<FigureName>[] = [
  { title: "100 emits per turn, against Redis", figure: "bursts", against: "redis", atLeast: 5 },
  { title: "one emit per turn, against Redis", figure: "single", against: "redis", atLeast: 4 },
  { title: "receiver CPU per packet, against Redis", figure: "receiverCpu", against: "redis", atMost: 0.15 },
  { title: "sender CPU per packet, against Redis", figure: "senderCpu", against: "redis", atMost: 0.18 },
  { title: "100 emits per turn, against sharded Redis", figure: "bursts", against: "sharded", atLeast: 4 },
  { title: "one emit per turn, against sharded Redis", figure: "single", against: "sharded", atLeast: 3 },
  { title: "latency p50 at 500/s, against amqplib alone", figure: "p50at500", against: "amqplib", atMost: 1.3 },
  { title: "latency p50 at 500/s, against Redis", figure: "p50at500", against: "redis", atMost: 1.4 },
  { title: "CPU of a server without the room, per packet", figure: "bystanderCpu", atMost: 0.1 },
  { title: "broker operations per client that comes and goes", figure: "clientOperations", atMost: 0 },
  { title: "idle messages per server and heartbeat, 1,000 namespaces", figure: "idle", atMost: 1 },
  { title: "10,000 rooms bound again after a reconnect", figure: "rebound", atMost: 3 },
  { title: "heap per room beyond in memory", figure: "roomHeap", atMost: 512 },
  { title: "CPU per emit with 8 servers, against 2", figure: "servers8Cpu", against: "servers2Cpu", atMost: 1.2 },
];

// ── What was asked for ───────────────────────────────────────────────────────────────────────────────────────────────

const { values: options } = parseArgs({
  options: {
    quick: { type: "boolean", default: false },
    rounds: { type: "string" },
    cases: { type: "string" },
    transports: { type: "string" },
    json: { type: "string" },
    svg: { type: "string" },
    help: { type: "boolean", default: false },
  },
});
const rounds = Number(options.rounds ?? (options.quick ? 2 : 5));
/** How long a load lasts, in ms. */
const DURATION = options.quick ? 400 : 1_000;
const ROOM = "room42";
const ROOMS = Array.from({ length: 1_000 }, (_, i) => `room${i}`);
const MANY_ROOMS = Array.from({ length: 10_000 }, (_, i) => `room${i}`);
const BODY = { bytes: 100 };
const WINDOW = 10_000;

// ── The cases ────────────────────────────────────────────────────────────────────────────────────────────────────────

interface Case {
  transports: Transport[];
  /** No more rounds than this: those that take long, and those whose figure does not vary. */
  rounds: number;
  run(transport: Transport): Promise<Measured>;
}

const ALL = Object.keys(TRANSPORTS) as Transport[];
const AMQP = new Set<Transport>(["amqp0", "amqplib"]);
const REDIS = new Set<Transport>(["redis", "sharded", "streams"]);
const NETWORKED = ALL.filter((transport) => transport !== "memory");
const PEERS = NETWORKED.filter((transport) => transport !== "amqplib");

const throughput = (figure: FigureName, load: Partial<Load>): Case => ({
  transports: ALL,
  rounds,
  run: async (transport) => ({ [figure]: (await saturate(transport, load)).perSecond }),
});

const CASES: Record<string, Case> = {
  bursts: {
    transports: ALL,
    rounds,
    async run(transport) {
      const { perSecond, cpu, broker } = await saturate(transport, { burst: 100 });
      const [senderCpu, receiverCpu, bystanderCpu] = cpu;
      const across = { receiverCpu, bystanderCpu, brokerCpu: broker };
      return { bursts: perSecond, senderCpu, ...(transport === "memory" ? {} : across) };
    },
  },
  tens: throughput("tens", { burst: 10 }),
  single: throughput("single", { burst: 1 }),
  kilobyte: throughput("kilobyte", { body: { bytes: 1_000 } }),
  binary: throughput("binary", { body: { bytes: 100, binary: true } }),
  rooms: throughput("rooms", { rooms: ROOMS }),

  latency500: {
    transports: NETWORKED,
    rounds,
    async run(transport) {
      const [p50at500, p99at500] = await latency(transport, 500, DURATION);
      return { p50at500, p99at500 };
    },
  },
  latency20000: {
    transports: NETWORKED,
    rounds,
    async run(transport) {
      const [p50at20000, p99at20000] = await latency(transport, 20_000, 20 * DURATION);
      return { p50at20000, p99at20000 };
    },
  },

  joins: {
    transports: ["amqp0", "sharded", "amqplib"],
    rounds,
    async run(transport) {
      await using cluster = await Cluster.open(1, place(transport, { counted: true, heartbeatInterval: 60_000 }));
      const server = first(cluster);
      await server.call("join", ["warm", "up"]);
      const before = await operations(cluster);
      const ms = await server.call("timeJoin", ROOMS);
      const joinOperations = ((await operations(cluster)) - before) / ROOMS.length;
      return { joins: (ROOMS.length / ms) * 1000, ...(transport === "amqplib" ? {} : { joinOperations }) };
    },
  },

  clients: {
    transports: ["amqp0", "redis", "sharded", "streams"],
    rounds: 1,
    async run(transport) {
      await using cluster = await Cluster.open(2, place(transport, { counted: true, heartbeatInterval: 60_000 }));
      const clients = 500;
      await Bun.sleep(500); // what the servers tell each other at first
      const before = await operations(cluster);
      await first(cluster).call("connectAndDisconnect", clients);
      await Bun.sleep(200);
      return { clientOperations: ((await operations(cluster)) - before) / clients };
    },
  },

  rebind: {
    transports: ["amqp0", "sharded", "amqplib"],
    rounds: Math.min(rounds, 3),
    run: (transport) =>
      apart(transport, async (cluster, { cut }) => {
        const server = first(cluster);
        await server.call("join", MANY_ROOMS);
        const rebound = server.call("rebound", MANY_ROOMS.length);
        await cut();
        return { rebound: (await rebound) / 1000 };
      }),
  },

  heap: {
    transports: PEERS,
    rounds: Math.min(rounds, 3),
    async run(transport) {
      const inMemory = await roomHeap("memory");
      return { roomHeap: (await roomHeap(transport)) - inMemory };
    },
  },

  queue: {
    transports: ["amqp0", "redis", "sharded"],
    rounds: Math.min(rounds, 3),
    run: (transport) =>
      apart(transport, async (cluster, { remove }) => {
        const server = first(cluster);
        await server.call("emit", ROOM, BODY, 10_000);
        await Bun.sleep(500);
        await remove();
        await Bun.sleep(500);
        const before = await server.call("heap");
        await server.call("emit", ROOM, BODY, 10_000);
        return { queueHeap: ((await server.call("heap")) - before) / 1e6 };
      }),
  },

  idle: {
    transports: PEERS,
    rounds: 1,
    async run(transport) {
      const servers = 4;
      const interval = 1_000;
      await using cluster = await Cluster.open(
        servers,
        place(transport, { counted: true, heartbeatInterval: interval }),
      );
      await Promise.all(cluster.workers.map((worker) => worker.call("openNamespaces", 1_000)));
      await Bun.sleep(2 * interval);
      const before = await operations(cluster);
      await Bun.sleep(4.5 * interval); // holds five beats of each server at most
      return { idle: ((await operations(cluster)) - before) / servers / 5 };
    },
  },

  servers: {
    transports: ["amqp0", "redis", "sharded"],
    rounds: Math.min(rounds, 3),
    async run(transport) {
      await using cluster = await Cluster.open(2, place(transport));
      const [sender, receiver] = cluster.workers as [Worker, Worker];
      await sender.call("join", [ROOM]);
      await receiver.call("join", [ROOM]);
      const measured: Measured = {};
      for (const servers of [2, 4, 8] as const) {
        while (cluster.workers.length < servers) await (await cluster.add()).call("join", []);
        await warmUp(sender, [1]);
        const { perSecond, cpu, broker } = await load(cluster, { slots: [1] });
        measured[`servers${servers}`] = perSecond;
        measured[`servers${servers}Cpu`] = cpu.reduce((sum, server) => sum + server, broker);
      }
      return measured;
    },
  },

  fanout: {
    transports: PEERS,
    rounds: Math.min(rounds, 3),
    async run(transport) {
      const clients = 1_000;
      await using cluster = await Cluster.open(2, place(transport));
      const servers = [...cluster.workers];
      const audience = await cluster.add({ transport: "memory" });
      for (const server of servers)
        await audience.call("connectClients", await server.call("listen", ROOM), clients / servers.length);
      await first(cluster).call("probe", ROOM, [2]);
      const { perSecond } = await load(cluster, { burst: 10, slots: [2], copies: clients, window: 100 });
      return { fanout: perSecond * clients };
    },
  },
};

/** A sender, a receiver with the rooms and a server without them, the same for all throughput and latency cases. */
const trios = new Map<Transport, Promise<Cluster>>();

function trio(transport: Transport): Promise<Cluster> {
  const open = async () => {
    const alone = transport === "memory";
    const cluster = await Cluster.open(alone ? 1 : 3, place(transport));
    await cluster.workers[alone ? 0 : 1]?.call("join", [ROOM, ...ROOMS]);
    await cluster.workers[2]?.call("join", []);
    await warmUp(first(cluster), receivers(transport));
    return cluster;
  };
  const cluster = trios.get(transport) ?? open();
  trios.set(transport, cluster);
  return cluster;
}

const receivers = (transport: Transport): number[] => [transport === "memory" ? 0 : 1];

async function warmUp(sender: Worker, slots: number[]): Promise<void> {
  await sender.call("probe", ROOM, slots);
  for (const burst of [100, 1]) await sender.call("saturate", { ...LOAD, burst, slots, ms: 300 });
}

const LOAD: Load = { rooms: [ROOM], body: BODY, burst: 100, ms: DURATION, slots: [], copies: 1, window: WINDOW };

async function saturate(transport: Transport, options: Partial<Load>): ReturnType<typeof load> {
  return load(await trio(transport), { slots: receivers(transport), ...options });
}

/** Packets per second, and the CPU per packet, in µs, of each server and of the broker. */
async function load(cluster: Cluster, options: Partial<Load>) {
  const { transport } = cluster.place;
  const brokerPid = AMQP.has(transport) ? brokerPids.amqp : brokerPids.redis;
  const measure = async () => [await cpuOf(brokerPid), ...(await cluster.cpu())];
  const idleSince = await measure();
  await Bun.sleep(200);
  const before = await measure();
  const { packets, ms } = await first(cluster).call("saturate", { ...LOAD, ...options });
  const after = await measure();
  const perPacket = after.map((value, i) => {
    const start = before[i] ?? NaN;
    const idle = ((start - (idleSince[i] ?? NaN)) / 200) * ms;
    return Math.max(0, value - start - idle) / packets;
  });
  const [broker = NaN, ...cpu] = perPacket;
  return { perSecond: (packets / ms) * 1000, cpu, broker };
}

/** p50 and p99 in ms. */
async function latency(transport: Transport, rate: number, count: number): Promise<[number, number]> {
  const cluster = await trio(transport);
  const [sender, receiver] = cluster.workers as [Worker, Worker];
  await receiver.call("record", true);
  await sender.call("pace", { room: ROOM, body: BODY, rate, count, slots: [1] });
  await receiver.call("record", false);
  const ms = (await cluster.times(count)).map(({ sent, received }) => received - sent).sort((a, b) => a - b);
  return [ms[Math.floor(count * 0.5)] ?? NaN, ms[Math.floor(count * 0.99)] ?? NaN];
}

async function roomHeap(transport: Transport): Promise<number> {
  await using cluster = await Cluster.open(1, place(transport));
  const server = first(cluster);
  await server.call(
    "join",
    ROOMS.map((room) => `warm up ${room}`),
  );
  const before = await server.call("heap");
  await server.call("join", MANY_ROOMS);
  await Bun.sleep(500);
  return ((await server.call("heap")) - before) / MANY_ROOMS.length;
}

interface Outage {
  /** Drops the connections. */
  cut(): Promise<unknown>;
  /** Drops them for good. */
  remove(): Promise<unknown>;
}

/** Runs with one server whose connections can be lost without those of the others. */
async function apart(
  transport: Transport,
  run: (cluster: Cluster, outage: Outage) => Promise<Measured>,
): Promise<Measured> {
  if (AMQP.has(transport)) {
    const vhost = `bench-${crypto.randomUUID()}`;
    await broker.ctl("add_vhost", vhost);
    const url = new URL(broker.url);
    url.pathname = vhost;
    await broker.ctl("set_permissions", "-p", vhost, url.username || "guest", ".*", ".*", ".*");
    let exists = true;
    const remove = async () => {
      if (exists) await broker.ctl("delete_vhost", vhost);
      exists = false;
    };
    try {
      await using cluster = await Cluster.open(1, place(transport, { amqp: url.href }));
      return await run(cluster, { cut: () => broker.ctl("close_all_connections", "--vhost", vhost, "bench"), remove });
    } finally {
      await remove();
    }
  }
  const redis = await startRedis();
  if (!redis) return {};
  try {
    await using cluster = await Cluster.open(1, place(transport, { redis: redis.url }));
    return await run(cluster, { cut: redis.cut, remove: redis.close });
  } finally {
    await redis.close();
  }
}

function place(transport: Transport, options: Partial<Place> = {}): Omit<Place, "prefix"> {
  const brokers = { amqp: broker.url, redis: redis?.url ?? "" };
  return { transport, ...brokers, heartbeatInterval: 5_000, counted: false, ...options };
}

function first({ workers: [worker] }: Cluster): Worker {
  if (!worker) throw new Error("an empty cluster");
  return worker;
}

/** What was asked of the broker so far. */
async function operations(cluster: Cluster): Promise<number> {
  return AMQP.has(cluster.place.transport) ? cluster.operations() : ((await redis?.operations()) ?? NaN);
}

// ── The run ──────────────────────────────────────────────────────────────────────────────────────────────────────────

async function main(): Promise<void> {
  const elapsed = () => Math.round(performance.now() / 1000);
  const samples = new Map<FigureName, Map<Transport, number[]>>();
  const selected = Object.entries(CASES).filter(([name]) => names(options.cases, CASES).includes(name));
  const transports = names(options.transports, TRANSPORTS).filter((transport) => redis || !REDIS.has(transport));
  if (!redis) console.error("No redis-server here: its columns are left out.");

  for (let round = 1; round <= rounds; round++) {
    for (const [name, { transports: some, rounds, run }] of selected.filter(([, { rounds }]) => round <= rounds)) {
      for (const transport of some.filter((transport) => transports.includes(transport))) {
        console.error(`${elapsed()} s: round ${round}, ${name}, ${TRANSPORTS[transport]}`);
        for (const [figure, value] of Object.entries(await run(transport)) as [FigureName, number][]) {
          const row = samples.get(figure) ?? new Map<Transport, number[]>();
          samples.set(figure, row.set(transport, [...(row.get(transport) ?? []), value]));
        }
      }
    }
  }
  for (const cluster of trios.values()) await (await cluster)[Symbol.asyncDispose]();

  const results = summarise(FIGURES, samples, redis ? "redis" : "amqplib");
  const verdicts = judge(TARGETS, results);
  const machine = `${cpus().length} cores, Bun ${Bun.version}, ${BODY.bytes}-byte payload unless said, medians of ${rounds} rounds`;
  console.log([table(results, transports), machine, "", targetTable(verdicts)].join("\n"));
  if (options.json) await Bun.write(options.json, JSON.stringify({ machine, results, targets: verdicts }, null, 2));
  if (options.svg) await Bun.write(options.svg, chart(results, machine));
}

/** The keys of a record that a comma-separated list names: all if there is none. */
function names<K extends string>(list: string | undefined, record: Record<K, unknown>): K[] {
  const keys = Object.keys(record) as K[];
  const unknown = list?.split(",").find((name) => !keys.includes(name as K));
  if (unknown !== undefined) throw new Error(`"${unknown}" is none of ${keys.join(", ")}`);
  return list === undefined ? keys : keys.filter((key) => list.split(",").includes(key));
}

if (options.help) {
  console.log(USAGE);
  process.exit();
}
for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, () => process.exit(1));
const broker = await startBroker({ name: "bench" });
const redis = await startRedis();
const brokerPids = {
  amqp: Number(/\d+/.exec(await broker.ctl("eval", "os:getpid()."))?.[0]),
  redis: redis?.pid ?? NaN,
};
try {
  await main();
} finally {
  await redis?.close();
  await broker.close();
}
