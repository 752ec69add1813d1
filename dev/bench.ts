/**
 * How fast the adapter is, beside its peers: `bun run bench`. Every case is run in turn over all transports, several times,
 * and the median counts. Machines differ and are noisy: what is worth reading is the ratio within one run.
 */
import { cpus } from "node:os";
import { resolve } from "node:path";
import { parseArgs } from "node:util";
import { Cluster, cpuOf, startRedis, type Worker } from "./bench/cluster.ts";
import { chart, judge, page, summarise, table, targetTable, type Figure, type Target } from "./bench/report.ts";
import { TRANSPORTS, type Place, type Transport } from "./bench/transports.ts";
import type { Load } from "./bench/worker.ts";
import { startBroker } from "./broker.ts";
import { Proxy } from "./proxy.ts";

const USAGE = `bun run bench [options]
  --quick            five minutes instead of half an hour
  --rounds N         how often each case is run
  --cases a,b        only these
  --transports a,b   only these
  --before FILE      compares with another index.ts too, as of git show HEAD~1:index.ts > before.ts
  --profile FOLDER   puts a CPU profile of each process there
  --json FILE        writes all figures
  --markdown FILE    writes them as a page: dev/benchmark.md
  --svg FILE         draws the most important ones`;

// ── What is measured, and what it must reach ─────────────────────────────────────────────────────────────────────────

const FIGURES = {
  bursts: { title: "one room, 100 emits per turn", unit: "/s" },
  tens: { title: "one room, 10 emits per turn", unit: "/s" },
  single: { title: "one room, one emit per turn", unit: "/s" },
  kilobyte: { title: "1 KB, 100 per turn", unit: "/s" },
  binary: { title: "binary attachment, 100 per turn", unit: "/s" },
  rooms: { title: "1,000 rooms in turn, 100 per turn", unit: "/s" },
  rooms20000: { title: "20,000 rooms in turn, 100 per turn", unit: "/s" },
  rooms8: { title: "8 servers, 1,000 rooms spread over them, 100 per turn", unit: "/s" },
  pair: { title: "to(a).to(b), 10,000 rooms bound, 100 per turn", unit: "/s" },
  pairs: { title: "to(a).to(b), 10,000 rooms bound, other pairs in turn, 100 per turn", unit: "/s" },
  pairSingle: { title: "to(a).to(b), 10,000 rooms bound, one emit per turn", unit: "/s" },
  loop: { title: "200,000 emits in one loop, 1,000 rooms, until the last has arrived", unit: "s" },
  loopEmit: { title: "200,000 emits in one loop: the loop alone", unit: "s" },
  loopLost: { title: "200,000 emits in one loop: packets lost", unit: "", absolute: true },
  loopMemory: {
    title: "sender's memory a minute and a heartbeat after 200,000 emits in one loop, beyond before",
    unit: "MB",
    absolute: true,
  },
  senderCpu: { title: "CPU per packet: sender", unit: "µs" },
  receiverCpu: { title: "CPU per packet: receiver", unit: "µs" },
  bystanderCpu: { title: "CPU per packet: server without the room", unit: "µs" },
  brokerCpu: { title: "CPU per packet: broker", unit: "µs" },
  roomsSenderCpu: { title: "1,000 rooms in turn, CPU per packet: sender", unit: "µs" },
  roomsReceiverCpu: { title: "1,000 rooms in turn, CPU per packet: receiver", unit: "µs" },
  roomsBystanderCpu: { title: "1,000 rooms in turn, CPU per packet: server without the rooms", unit: "µs" },
  roomsBrokerCpu: { title: "1,000 rooms in turn, CPU per packet: broker", unit: "µs" },
  quiet: { title: "server without the room: messages per 1,000 packets", unit: "", absolute: true },
  quietRooms: {
    title: "server without the rooms, 1,000 in turn: messages per 1,000 packets",
    unit: "",
    absolute: true,
  },
  p50at500: { title: "latency at 500/s: p50", unit: "ms" },
  p99at500: { title: "latency at 500/s: p99", unit: "ms" },
  p50at20000: { title: "latency at 20,000/s: p50", unit: "ms" },
  p99at20000: { title: "latency at 20,000/s: p99", unit: "ms" },
  servers2: { title: "2 servers, room on two", unit: "/s" },
  servers4: { title: "4 servers, room on two", unit: "/s" },
  servers8: { title: "8 servers, room on two", unit: "/s" },
  servers2Cpu: { title: "2 servers: CPU per emit, broker included", unit: "µs" },
  servers4Cpu: { title: "4 servers: CPU per emit, broker included", unit: "µs" },
  servers8Cpu: { title: "8 servers: CPU per emit, broker included", unit: "µs" },
  fanout: { title: "deliveries to 1,000 WebSockets on two servers", unit: "/s" },
  joins100: { title: "first joins, 100 rooms", unit: "/s" },
  joins100Operations: { title: "first joins, 100 rooms: broker operations of each", unit: "", absolute: true },
  joins1000: { title: "first joins, 1,000 rooms", unit: "/s" },
  joins1000Operations: { title: "first joins, 1,000 rooms: broker operations of each", unit: "", absolute: true },
  joins10000: { title: "first joins, 10,000 rooms", unit: "/s" },
  joins10000Missed: { title: "first joins, 10,000 rooms: that then missed an emit", unit: "", absolute: true },
  live: { title: "live again after a cut connection, 10,000 rooms", unit: "s" },
  clientOperations: { title: "broker operations per client that comes and goes", unit: "", absolute: true },
  idle: { title: "idle messages per server and heartbeat, 1,000 namespaces", unit: "", absolute: true },
  rebound: { title: "10,000 rooms bound again after a reconnect", unit: "s" },
  roomHeap: { title: "heap per room beyond in memory", unit: "B", absolute: true },
  queueHeap: { title: "heap of 10,000 queued packets", unit: "MB" },
  sessionHeap: { title: "heap of 10,000 sessions that wait", unit: "MB" },
} satisfies Record<string, Figure>;
type FigureName = keyof typeof FIGURES;
type Measured = Partial<Record<FigureName, number>>;

const TARGETS: Target<FigureName>[] = [
  { title: "100 emits per turn, against Redis", figure: "bursts", against: "redis", atLeast: 5 },
  { title: "one emit per turn, against Redis", figure: "single", against: "redis", atLeast: 4 },
  { title: "1,000 rooms in turn, against Redis", figure: "rooms", against: "redis", atLeast: 3 },
  { title: "1,000 rooms in turn, against sharded Redis", figure: "rooms", against: "sharded", atLeast: 2 },
  { title: "20,000 rooms in turn, against Redis", figure: "rooms20000", against: "redis", atLeast: 2 },
  { title: "1,000 rooms over 8 servers, against Redis", figure: "rooms8", against: "redis", atLeast: 3 },
  { title: "to(a).to(b), against Redis", figure: "pair", against: "redis", atLeast: 1.5 },
  { title: "to(a).to(b), other pairs in turn, against Redis", figure: "pairs", against: "redis", atLeast: 1.5 },
  { title: "200,000 emits in one loop, against Redis", figure: "loop", against: "redis", atMost: 0.4 },
  { title: FIGURES.loopLost.title, figure: "loopLost", atMost: 0 },
  { title: FIGURES.loopMemory.title, figure: "loopMemory", atMost: 32 },
  { title: FIGURES.quiet.title, figure: "quiet", atMost: 0 },
  { title: FIGURES.joins10000.title, figure: "joins10000", atLeast: 50_000 },
  { title: FIGURES.joins10000Missed.title, figure: "joins10000Missed", atMost: 0 },
  { title: "deliveries to WebSockets, against Redis", figure: "fanout", against: "redis", atLeast: 1 },
  { title: "receiver CPU per packet, against Redis", figure: "receiverCpu", against: "redis", atMost: 0.15 },
  { title: "sender CPU per packet, against Redis", figure: "senderCpu", against: "redis", atMost: 0.18 },
  { title: "100 emits per turn, against sharded Redis", figure: "bursts", against: "sharded", atLeast: 4 },
  { title: "one emit per turn, against sharded Redis", figure: "single", against: "sharded", atLeast: 3 },
  { title: "latency p50 at 500/s, against amqplib alone", figure: "p50at500", against: "amqplib", atMost: 1.3 },
  { title: "latency p50 at 500/s, against Redis", figure: "p50at500", against: "redis", atMost: 1.4 },
  { title: "CPU of a server without the room, per packet", figure: "bystanderCpu", atMost: 0.1 },
  { title: "CPU per emit with 8 servers, against 2", figure: "servers8Cpu", against: "servers2Cpu", atMost: 1.2 },
  { title: FIGURES.clientOperations.title, figure: "clientOperations", atMost: 0 },
  { title: FIGURES.idle.title, figure: "idle", atMost: 1 },
  { title: FIGURES.rebound.title, figure: "rebound", atMost: 3 },
  { title: FIGURES.roomHeap.title, figure: "roomHeap", atMost: 512 },
  ...(["bursts", "tens", "single", "kilobyte", "binary", "rooms"] as const).map((figure) => ({
    title: `${FIGURES[figure].title}, against itself with state recovery`,
    figure,
    against: "recovery" as const,
    atMost: 1.67,
  })),
  ...(["bursts", "tens", "single", "kilobyte", "binary", "servers2", "servers4", "servers8"] as const).map(
    (figure) => ({
      title: `${FIGURES[figure].title}, against the version before`,
      figure,
      against: "before" as const,
      atLeast: 0.95,
    }),
  ),
  ...(["senderCpu", "receiverCpu", "brokerCpu", "p50at500", "p99at500", "p50at20000", "p99at20000"] as const).map(
    (figure) => ({
      title: `${FIGURES[figure].title}, against the version before`,
      figure,
      against: "before" as const,
      atMost: 1.05,
    }),
  ),
];

// ── What was asked for ───────────────────────────────────────────────────────────────────────────────────────────────

const { values: options } = parseArgs({
  options: {
    quick: { type: "boolean", default: false },
    rounds: { type: "string" },
    cases: { type: "string" },
    transports: { type: "string" },
    before: { type: "string" },
    profile: { type: "string" },
    markdown: { type: "string" },
    json: { type: "string" },
    svg: { type: "string" },
    help: { type: "boolean", default: false },
  },
});
if (options.help) {
  console.log(USAGE);
  process.exit();
}
const rounds = Number(options.rounds ?? (options.quick ? 1 : 5));
/** For what takes long or varies little. */
const fewRounds = Math.min(rounds, 3);

const ALL = Object.keys(TRANSPORTS) as Transport[];
const NETWORKED = ALL.filter((transport) => transport !== "memory");
const PEERS = NETWORKED.filter((transport) => transport !== "amqplib");
const AMQP = new Set<Transport>(["amqp0", "before", "recovery", "amqplib"]);
const REDIS = new Set<Transport>(["redis", "sharded", "streams"]);

const ROOM = "room42";
const roomNames = (count: number, prefix = "room") => Array.from({ length: count }, (_, i) => `${prefix}${i}`);
/** A thousandth of the rooms. */
const thousandth = (rooms: string[]) => rooms.filter((_, i) => i % 1_000 === 0);
const BODY = { bytes: 100 };
const LOAD: Load = {
  rooms: [ROOM],
  body: BODY,
  burst: 100,
  ms: options.quick ? 500 : 1_000,
  slots: [],
  copies: 1,
  window: 10_000,
};

// ── The cases ────────────────────────────────────────────────────────────────────────────────────────────────────────

interface Case {
  transports: Transport[];
  rounds: number;
  run(transport: Transport): Promise<Measured>;
}

/** Waits until so many rooms are bound: joins are live before, while the queue takes everything. */
async function bound(transport: Transport, server: Worker, rooms: number): Promise<void> {
  if (!["amqp0", "before", "recovery"].includes(transport)) return;
  while ((await server.call("bound")) < rooms) await Bun.sleep(20);
}

const CASES: Record<string, Case> = {
  bursts: {
    transports: ALL,
    rounds,
    async run(transport) {
      const { perSecond, cpu, brokerCpu } = await saturate(transport, {});
      const [senderCpu, receiverCpu, bystanderCpu] = cpu;
      const sent = { bursts: perSecond, senderCpu };
      return transport === "memory" ? sent : { ...sent, receiverCpu, bystanderCpu, brokerCpu };
    },
  },
  tens: throughput("tens", { burst: 10 }),
  single: throughput("single", { burst: 1 }),
  kilobyte: throughput("kilobyte", { body: { bytes: 1_000 } }),
  binary: throughput("binary", { body: { ...BODY, binary: true } }),
  rooms: {
    transports: ALL,
    rounds,
    async run(transport) {
      const { perSecond, cpu, brokerCpu } = await saturate(transport, { rooms: roomNames(1_000) });
      const [roomsSenderCpu, roomsReceiverCpu, roomsBystanderCpu] = cpu;
      if (transport === "memory") return { rooms: perSecond, roomsSenderCpu };
      return { rooms: perSecond, roomsSenderCpu, roomsReceiverCpu, roomsBystanderCpu, roomsBrokerCpu: brokerCpu };
    },
  },

  crowd: {
    transports: ["amqp0", "before", "redis", "sharded"],
    rounds: fewRounds,
    run: (transport) =>
      apart(transport, { servers: 3 }, async ({ cluster }) => {
        const [sender, receiver, other] = cluster.workers as [Worker, Worker, Worker];
        const slots = [1];
        const rooms = roomNames(20_000);
        await Promise.all([receiver.call("join", [ROOM, ...rooms.slice(0, 10_000)]), other.call("join", [])]);
        await bound(transport, receiver, 10_000);
        await warmUp(sender, slots);
        const pairs = rooms.slice(0, 10_000).map((room, i) => [room, rooms[(i + 5_000) % 10_000] ?? ""]);
        const pair = await load(cluster, { slots, rooms: pairs.slice(0, 1) });
        const inTurn = await load(cluster, { slots, rooms: pairs });
        const single = await load(cluster, { slots, rooms: pairs.slice(0, 1), burst: 1, window: 1_000 });
        await receiver.call("join", rooms);
        await bound(transport, receiver, rooms.length);
        await sender.call("probe", rooms.at(-1) ?? "", slots);
        const { perSecond: rooms20000 } = await load(cluster, { slots, rooms });
        return { pair: pair.perSecond, pairs: inTurn.perSecond, pairSingle: single.perSecond, rooms20000 };
      }),
  },

  spread: {
    transports: ["amqp0", "before", "redis", "sharded"],
    rounds: fewRounds,
    async run(transport) {
      const rooms = roomNames(1_000);
      await using cluster = await Cluster.open(8, place(transport));
      const share = (server: number) => rooms.filter((_, i) => i % 8 === server);
      await Promise.all(
        cluster.workers.map((server, i) => server.call("join", i === 1 ? [ROOM, ...share(i)] : share(i))),
      );
      const slots = cluster.workers.map((_, i) => i);
      await warmUp(first(cluster), [1]);
      // Servers 2 to 7 have compiled nothing yet, and get an eighth of the packets each.
      await first(cluster).call("saturate", { ...LOAD, rooms, slots, ms: 5_000 });
      const { perSecond } = await load(cluster, { rooms, slots });
      return { rooms8: perSecond };
    },
  },

  loop: {
    transports: ["amqp0", "before", "redis", "sharded", "amqplib"],
    rounds: fewRounds,
    async run(transport) {
      const cluster = await trio(transport);
      const loop = { ...LOAD, rooms: roomNames(1_000), slots: receivers(transport) };
      const { emitted, ms, lost } = await first(cluster).call("loop", loop, 200_000);
      // Had it lost fewer, it would have taken longer.
      return { loop: lost > 0 ? NaN : ms / 1000, loopEmit: emitted / 1000, loopLost: lost };
    },
  },

  memory: {
    transports: ["amqp0", "before", "redis", "sharded"],
    rounds: 1,
    async run(transport) {
      const rooms = roomNames(1_000);
      await using cluster = await Cluster.open(2, place(transport));
      const [sender, receiver] = cluster.workers as [Worker, Worker];
      await receiver.call("join", rooms);
      await sender.call("probe", "room1", [1]);
      const before = await sender.call("memory");
      await sender.call("loop", { ...LOAD, rooms, slots: [1] }, 200_000);
      await Bun.sleep(66_000); // what the journal keeps for a minute goes with the next heartbeat
      return { loopMemory: ((await sender.call("memory")) - before) / 1e6 };
    },
  },

  quiet: {
    transports: ["amqp0", "before", "redis", "sharded", "amqplib"],
    rounds: 1,
    async run(transport) {
      const rooms = roomNames(1_000);
      await using cluster = await Cluster.open(3, place(transport, { counted: true, heartbeatInterval: 60_000 }));
      const [sender, receiver, quiet] = cluster.workers as [Worker, Worker, Worker];
      await Promise.all([receiver.call("join", [ROOM, ...rooms]), quiet.call("join", [])]);
      await sender.call("probe", ROOM, [1]);
      await Bun.sleep(1_000);
      const reaching = async (options: Partial<Load>) => {
        const before = await quiet.call("messages");
        const { packets } = await sender.call("saturate", { ...LOAD, slots: [1], ...options });
        return (((await quiet.call("messages")) - before) / packets) * 1_000;
      };
      return { quiet: await reaching({}), quietRooms: await reaching({ rooms }) };
    },
  },

  latency500: {
    transports: NETWORKED,
    rounds,
    async run(transport) {
      const [p50at500, p99at500] = await latency(transport, 500, 1_000);
      return { p50at500, p99at500 };
    },
  },
  latency20000: {
    transports: NETWORKED,
    rounds,
    async run(transport) {
      const [p50at20000, p99at20000] = await latency(transport, 20_000, 20_000);
      return { p50at20000, p99at20000 };
    },
  },

  servers: {
    transports: ["amqp0", "before", "redis", "sharded"],
    rounds: fewRounds,
    async run(transport) {
      await using cluster = await Cluster.open(2, place(transport));
      const [sender, receiver] = cluster.workers as [Worker, Worker];
      await Promise.all([sender, receiver].map((server) => server.call("join", [ROOM])));
      const measured: Measured = {};
      for (const servers of [2, 4, 8] as const) {
        while (cluster.workers.length < servers) await (await cluster.add()).call("join", []);
        await warmUp(sender, [1], 1);
        const { perSecond, cpu, brokerCpu } = await load(cluster, { slots: [1] });
        measured[`servers${servers}`] = perSecond;
        measured[`servers${servers}Cpu`] = cpu.reduce((sum, server) => sum + server, brokerCpu);
      }
      return measured;
    },
  },

  fanout: {
    transports: PEERS,
    rounds: fewRounds,
    async run(transport) {
      const clients = 1_000;
      await using cluster = await Cluster.open(2, place(transport));
      const ports = await Promise.all(cluster.workers.map((server) => server.call("listen", ROOM)));
      const audience = await cluster.add({ transport: "memory" });
      for (const port of ports) await audience.call("connectClients", port, clients / ports.length);
      await first(cluster).call("probe", ROOM, [2]);
      const fanout = { burst: 10, slots: [2], copies: clients, window: 100 };
      const { perSecond } = await load(cluster, fanout);
      return { fanout: perSecond * clients };
    },
  },

  joins: {
    transports: ["amqp0", "before", "sharded", "amqplib"],
    rounds: fewRounds,
    run: (transport) =>
      apart(transport, { servers: 2 }, async ({ cluster, server, operations }) => {
        const measured: Measured = {};
        for (const count of [100, 1_000] as const) {
          const before = await operations();
          const ms = await server.call("join", roomNames(count, `of ${count}: `));
          measured[`joins${count}`] = (count / ms) * 1000;
          if (transport !== "amqplib") measured[`joins${count}Operations`] = ((await operations()) - before) / count;
        }
        const rooms = roomNames(10_000);
        measured.joins10000 = (rooms.length / (await server.call("join", rooms))) * 1000;
        measured.joins10000Missed = await cluster.workers[1]?.call("emitEach", rooms, [0]);
        return measured;
      }),
  },

  clients: {
    transports: PEERS,
    rounds: 1,
    run: (transport) =>
      apart(transport, {}, async ({ server, operations }) => {
        const clients = 500;
        const before = await operations();
        await server.call("connectAndDisconnect", clients);
        return { clientOperations: ((await operations()) - before) / clients };
      }),
  },

  idle: {
    transports: PEERS,
    rounds: 1,
    async run(transport) {
      const servers = 4;
      const heartbeatInterval = 1_000;
      await using cluster = await Cluster.open(servers, place(transport, { counted: true, heartbeatInterval }));
      await Promise.all(cluster.workers.map((server) => server.call("openNamespaces", 1_000)));
      await Bun.sleep(2 * heartbeatInterval);
      const operations = async () =>
        AMQP.has(transport) ? cluster.operations() : ((await redis?.operations()) ?? NaN);
      const before = await operations();
      await Bun.sleep(9.5 * heartbeatInterval); // holds ten beats of each server at most
      return { idle: ((await operations()) - before) / servers / 10 };
    },
  },

  rebind: {
    transports: ["amqp0", "before"],
    rounds: fewRounds,
    run: (transport) =>
      apart(transport, {}, async ({ server, cut }) => {
        const rooms = roomNames(10_000);
        await server.call("join", rooms);
        await bound(transport, server, rooms.length);
        const rebound = server.call("rebound", rooms.length);
        await cut();
        return { rebound: (await rebound) / 1000 };
      }),
  },

  live: {
    transports: ["amqp0", "before", "redis", "sharded"],
    rounds: fewRounds,
    run: (transport) =>
      apart(transport, {}, async ({ cluster, server: sender, url }) => {
        const proxy = await Proxy.open(Number(new URL(url).port));
        try {
          const proxied = Object.assign(new URL(url), { port: proxy.port }).href;
          const receiver = await cluster.add({ amqp: proxied, redis: proxied });
          const rooms = roomNames(10_000);
          await receiver.call("join", rooms);
          await sender.call("probe", rooms.at(-1) ?? "", [1]);
          await Bun.sleep(5_000); // in which what is bound behind the join is bound
          await sender.call("emitNames", thousandth(rooms));
          await Bun.sleep(1_000);
          const outage = 20;
          proxy.cut();
          await Bun.sleep(outage);
          proxy.heal();
          return { live: (outage + (await receiver.call("heard", thousandth(rooms), 30_000))) / 1000 };
        } finally {
          proxy.close();
        }
      }),
  },

  heap: {
    transports: PEERS,
    rounds: fewRounds,
    run: async (transport) => ({ roomHeap: (await roomHeap(transport)) - (await (inMemory ??= roomHeap("memory"))) }),
  },

  queue: {
    transports: ["amqp0", "before", "redis", "sharded"],
    rounds: fewRounds,
    run: (transport) =>
      apart(transport, {}, async ({ server, kill }) => {
        await server.call("emit", ROOM, BODY, 10_000);
        await Bun.sleep(500);
        await kill();
        await Bun.sleep(500);
        const before = await server.call("heap");
        await server.call("emit", ROOM, BODY, 10_000);
        return { queueHeap: ((await server.call("heap")) - before) / 1e6 };
      }),
  },

  sessions: {
    transports: ["recovery"],
    rounds: fewRounds,
    run: (transport) =>
      apart(transport, {}, async ({ server }) => {
        await server.call("connectAndDisconnect", 100); // warms up
        const before = await server.call("heap");
        await server.call("connectAndDisconnect", 10_000);
        return { sessionHeap: ((await server.call("heap")) - before) / 1e6 };
      }),
  },
};

function throughput(figure: FigureName, options: Partial<Load>): Case {
  return {
    transports: ALL,
    rounds,
    run: async (transport) => ({ [figure]: (await saturate(transport, options)).perSecond }),
  };
}

// ── The parts of the cases ───────────────────────────────────────────────────────────────────────────────────────────

/** A sender, a receiver with the rooms and a server without them: the same for all throughput and latency cases. */
const trios = new Map<Transport, Promise<Cluster>>();

function trio(transport: Transport): Promise<Cluster> {
  const open = async () => {
    const alone = transport === "memory";
    const cluster = await Cluster.open(alone ? 1 : 3, place(transport));
    await cluster.workers[alone ? 0 : 1]?.call("join", [ROOM, ...roomNames(1_000)]);
    await cluster.workers[2]?.call("join", []);
    await warmUp(first(cluster), receivers(transport));
    return cluster;
  };
  const cluster = trios.get(transport) ?? open();
  trios.set(transport, cluster);
  return cluster;
}

const receivers = (transport: Transport): number[] => [transport === "memory" ? 0 : 1];

/** It takes some 200,000 packets until the peers' code has been compiled: a third of the CPU time after the first of them. */
async function warmUp(sender: Worker, slots: number[], seconds = 3): Promise<void> {
  await sender.call("probe", ROOM, slots);
  await sender.call("saturate", { ...LOAD, slots, ms: seconds * LOAD.ms });
  await sender.call("saturate", { ...LOAD, slots, burst: 1 });
}

async function saturate(transport: Transport, options: Partial<Load>): ReturnType<typeof load> {
  return load(await trio(transport), { slots: receivers(transport), ...options });
}

/** Packets per second, and the CPU per packet of each server and of the broker, in µs, beyond what they use when idle. */
async function load(cluster: Cluster, options: Partial<Load>) {
  const pid = AMQP.has(cluster.place.transport) ? amqpPid : redis?.pid;
  const used = async () => [pid ? await cpuOf(pid) : NaN, ...(await cluster.cpu())];
  const idle = 200;
  await first(cluster).call("saturate", { ...LOAD, ...options }); // warms up: compiles, fills journals and streams
  const before = await used();
  await Bun.sleep(idle);
  const start = await used();
  const { packets, ms } = await first(cluster).call("saturate", { ...LOAD, ...options });
  const end = await used();
  const [brokerCpu = NaN, ...cpu] = end.map((used, i) => {
    const [idleFrom = NaN, from = NaN] = [before[i], start[i]];
    return Math.max(0, used - from - ((from - idleFrom) / idle) * ms) / packets;
  });
  return { perSecond: (packets / ms) * 1000, cpu, brokerCpu };
}

/** p50 and p99, in ms. */
async function latency(transport: Transport, rate: number, count: number): Promise<[number, number]> {
  const cluster = await trio(transport);
  const [sender, receiver] = cluster.workers as [Worker, Worker];
  await receiver.call("record", true);
  await sender.call("pace", { room: ROOM, body: BODY, rate, count, slots: [1] });
  await receiver.call("record", false);
  const ms = (await cluster.times(count)).map(({ sent, received }) => received - sent).sort((a, b) => a - b);
  return [ms[Math.floor(count * 0.5)] ?? NaN, ms[Math.floor(count * 0.99)] ?? NaN];
}

let inMemory: Promise<number> | undefined;

/** In bytes. */
function roomHeap(transport: Transport): Promise<number> {
  return apart(transport, {}, async ({ server }) => {
    const rooms = 10_000;
    await server.call("join", roomNames(1_000, "warm up "));
    const before = await server.call("heap");
    await server.call("join", roomNames(rooms));
    return ((await server.call("heap")) - before) / rooms;
  });
}

/** A cluster with a broker that nobody else uses. */
interface Apart {
  cluster: Cluster;
  /** The first of the cluster. */
  server: Worker;
  /** Where the broker is. */
  url: string;
  operations(): Promise<number>;
  /** Drops all connections. */
  cut(): Promise<unknown>;
  kill(): Promise<void>;
}

/** It need not clear up: to remove thousands of bindings takes a broker so long that the cases after it would suffer. */
async function apart<T>(
  transport: Transport,
  { servers = 1 }: { servers?: number },
  run: (apart: Apart) => Promise<T>,
): Promise<T> {
  const options = { counted: true, heartbeatInterval: 60_000 };
  if (REDIS.has(transport)) {
    const redis = await startRedis();
    if (!redis) throw new Error("no redis-server here");
    const { url, operations, close } = redis;
    await using cluster = await Cluster.open(servers, place(transport, { ...options, redis: url }));
    const server = first(cluster);
    return await run({ cluster, server, url, operations, cut: close, kill: close }).finally(close);
  }
  const broker = await startBroker({ name: "apart" });
  try {
    const { url } = broker;
    await using cluster = await Cluster.open(servers, place(transport, { ...options, amqp: url }));
    return await run({
      cluster,
      server: first(cluster),
      url,
      operations: () => cluster.operations(),
      cut: () => broker.ctl("close_all_connections", "bench"),
      kill: broker.kill,
    });
  } finally {
    await broker.close();
  }
}

function place(transport: Transport, options: Partial<Place> = {}): Omit<Place, "prefix"> {
  const brokers = { amqp: broker.url, redis: redis?.url ?? "" };
  return { transport, ...brokers, heartbeatInterval: 5_000, counted: false, before, profile, ...options };
}

function first({ workers: [worker] }: Cluster): Worker {
  if (!worker) throw new Error("an empty cluster");
  return worker;
}

// ── The run ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** The keys of a record that a comma-separated list names: all if there is none. */
function named<K extends string>(list: string | undefined, record: Record<K, unknown>): K[] {
  const keys = Object.keys(record) as K[];
  const unknown = list?.split(",").find((name) => !keys.some((key) => key === name));
  if (unknown !== undefined) throw new Error(`"${unknown}" is none of ${keys.join(", ")}`);
  return list === undefined ? keys : keys.filter((key) => list.split(",").includes(key));
}

const profile = options.profile && resolve(options.profile);
const before = options.before && resolve(options.before);
const cases = named(options.cases, CASES);
const wanted = named(options.transports, TRANSPORTS);
for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, () => process.exit(1));
const broker = await startBroker({ name: "bench" });
const redis = await startRedis();
if (!redis) console.error("No redis-server here: its columns are left out.");
const amqpPid = Number(/\d+/.exec(await broker.ctl("eval", "os:getpid()."))?.[0]);
const there = (transport: Transport) => (transport === "before" ? before : redis || !REDIS.has(transport));
const transports = wanted.filter(there);

const samples = new Map<FigureName, Map<Transport, number[]>>();
for (let round = 1; round <= rounds; round++)
  for (const name of cases)
    // Each round begins with another: what runs first finds a cold broker and what the case before has left.
    for (const transport of transports.map((_, i) => transports[(i + round - 1) % transports.length] ?? "amqp0")) {
      const { transports: fitting, rounds = 0, run } = CASES[name] ?? {};
      if (!run || round > rounds || !fitting?.includes(transport)) continue;
      console.error(`${Math.round(performance.now() / 1000)} s: round ${round}, ${name}, ${TRANSPORTS[transport]}`);
      const measured = await run(transport).catch((error: Error) => console.error(`  failed: ${error.message}`));
      for (const [figure, value] of Object.entries(measured ?? {}) as [FigureName, number][]) {
        const row = samples.get(figure) ?? new Map<Transport, number[]>();
        const rounds = row.get(transport) ?? [];
        while (rounds.length < round - 1) rounds.push(NaN); // it failed in those
        samples.set(figure, row.set(transport, [...rounds, value]));
      }
    }
for (const cluster of trios.values()) await (await cluster)[Symbol.asyncDispose]();
await redis?.close();
await broker.close();

const results = summarise(FIGURES, samples, redis ? "redis" : "amqplib");
const all = !options.cases && !options.transports;
const targets = judge(TARGETS, results).filter(({ verdict }) => all || verdict !== "not measured");
const note = `${cpus().length} cores, Bun ${Bun.version}, ${BODY.bytes} bytes unless said, medians of up to ${rounds} rounds`;
console.log([table(results, transports), `${note}.`, "", targets.length ? targetTable(targets) : ""].join("\n"));
if (options.markdown) await Bun.write(options.markdown, page(note, results, transports, targets));
if (options.json) await Bun.write(options.json, `${JSON.stringify({ note, results, targets }, null, 2)}\n`);
if (options.svg) await Bun.write(options.svg, chart(results, note));
