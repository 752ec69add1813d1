/**
 * `bun run chaos`: three servers, each a process of its own, emit numbered packets to each other's clients while something breaks.
 * Each client must get each packet of each server once and in order. Prints a Markdown table and fails if a row does.
 *
 *     bun run chaos --help
 *     bun run chaos --only broker,burst --rate 200 --seed 7 --quick
 *
 * Read from the top: the command · the cases · hostile input · the field (servers, links, brokers) · one server.
 */
import { connect, type ConfirmChannel } from "amqplib";
import { EventEmitter, once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { cpus } from "node:os";
import { parseArgs } from "node:util";
import { Server } from "socket.io";
import { Manager, type Socket as ClientSocket } from "socket.io-client";
import { createAdapter, type AdapterOptions, type AdapterStats, type AmqpAdapter } from "../index.ts";
import { startBroker, startCluster, type Broker } from "./broker.ts";
import { Proxy, type Role } from "./proxy.ts";

const PREFIX = "socket.io";
/** The exchanges that stay: everybody publishes to the first, queues are bound to the second by routing key. */
const KEYS = `${PREFIX}#keys`;
const STAYING = [PREFIX, KEYS];
/** A user with the least permissions, for the cases that take one of them away. */
const USER = "chaos";
const GRANTED = "^socket\\.io(#.*)?$";
const PERMISSIONS = ["configure", "write", "read"] as const;
/** Seconds of traffic before and after a fault, and for how long nothing may arrive before it counts as lost. */
const BEFORE = 2;
const AFTER = 3;
const PATIENCE = 20;
/** What the memory of a server may grow by, in MB, and how long it may take to go back to that, in seconds: peers are
 * remembered for as long as their journals last, and freed memory goes back to the system by and by. */
const GROWTH = 150;
const FORGETTING = 90;
/** Packets that were under way when a link was cut may have arrived, which their sender never learns: it counts them as dropped. */
const IN_DOUBT = 50;
/** How many emits a burst has, and in how many rooms the clients are where there are many. */
const BURST = 200_000;
const CROWD = 10_000;
/** Clients that lose their connections and come back, how often each, how many ms they stay, and are away, at most. */
const ROAMERS = 50;
const RETURNS = 100;
const STAY = 900;
const AWAY = 100;

const { values: args } = parseArgs({
  options: {
    only: { type: "string", default: "" },
    rate: { type: "string", default: "200,5000" },
    seed: { type: "string", default: String(Math.floor(Math.random() * 1e6)) },
    quick: { type: "boolean", default: false },
    list: { type: "boolean", default: false },
    write: { type: "boolean", default: false },
    help: { type: "boolean", short: "h", default: false },
    server: { type: "string" }, // how this file starts the servers
  },
});

const HELP = `Three Socket.IO servers emit to each other's clients while something breaks. Fails if a packet is lost, doubled or reordered.

  bun run chaos [options]

  --only <points>   only these, by name, e.g. broker,burst (all)
  --rate <rates>    packets/s of each server, one run for each (200,5000)
  --seed <n>        of whatever is random (another one each time)
  --quick           long outages last 4 s instead of 20 s, and 20,000 hostile messages are sent instead of 100,000
  --write           writes the table of this run to dev/faults.md
  --list            lists the points
  -h, --help        shows this

The broker is a private one, or the one that AMQP_URL names; RABBITMQ_SERVER is the path of another rabbitmq-server.`;

/** How many hostile messages are sent. */
const HOSTILE = args.quick ? 20_000 : 100_000;
/** So many of them at a time. */
const VOLLEY = 500;

// ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────

const COLUMNS =
  "point|fault|packets/s|sent|lost|doubled|reordered|unhandled rejections|reported lost|replayed|reconnects|longest gap|memory|verdict".split(
    "|",
  );
const TABLE = new URL("faults.md", import.meta.url);

type Row = (string | number)[];

async function main(): Promise<void> {
  if (args.help) return console.log(HELP);
  const all = cases(args.quick ? 4 : 20);
  const points = new Set(all.map(({ point }) => point));
  const only = args.only.split(",").filter(Boolean);
  const unknown = only.filter((point) => !points.has(point));
  if (unknown.length > 0) {
    console.error(`There is no point ${unknown.join(", ")}; there are ${[...points].join(", ")}.`);
    process.exitCode = 1;
    return;
  }
  const chosen = all.filter(({ point }) => only.length === 0 || only.includes(point));
  if (args.list) return console.log(chosen.map(({ point, title }) => `${point.padEnd(12)}${title}`).join("\n"));
  console.log(`seed ${args.seed}\n`);
  printRow(COLUMNS);
  printRow(COLUMNS.map(() => "---"));
  const rows: Row[] = [];
  const versions = new Set<string>();
  let failed = 0;
  for (const nodes of [1, 3]) {
    const group = chosen.filter((c) => (c.nodes ?? 1) === nodes);
    if (group.length === 0) continue;
    const brokers = nodes === 1 ? [await startBroker({ name: "chaos" })] : await startCluster(nodes);
    try {
      for (const { url } of brokers) versions.add(await versionOf(url));
      for (const c of group) {
        for (const rate of c.rates ?? args.rate.split(",").map(Number)) {
          const { row, ok } = await run(c, rate, brokers);
          if (!ok) failed++;
          rows.push(row);
          if (args.write) await Bun.write(TABLE, document(rows, [...versions]));
        }
      }
    } finally {
      for (const broker of brokers) await broker.close();
    }
  }
  console.log(`\n${failed === 0 ? "All came through." : `${failed} did not come through.`}`);
  process.exitCode = failed === 0 ? 0 : 1;
}

function printRow(cells: Row): void {
  console.log(`| ${cells.join(" | ")} |`);
}

async function versionOf(url: string): Promise<string> {
  const connection = await connect(url);
  const { product, version } = connection.connection.serverProperties;
  await connection.close();
  return `${product} ${version}`;
}

/** What `--write` writes: Markdown, laid out as Prettier does. */
function document(rows: Row[], versions: string[]): string {
  const cells = [COLUMNS, ...rows].map((row) => row.map(String));
  const widths = COLUMNS.map((_, i) => Math.max(...cells.map((row) => row[i]?.length ?? 0)));
  const line = (row: string[]) => `| ${widths.map((width, i) => (row[i] ?? "").padEnd(width)).join(" | ")} |`;
  const [head = [], ...body] = cells;
  const table = [line(head), line(widths.map((width) => "-".repeat(width))), ...body.map(line)];
  return `# Faults

Three servers, each a process of its own, emit numbered packets to each other's clients while something breaks.

- **packets/s**: of each server that emits. **sent**: by all of them.
- **lost**, **doubled**, **reordered**: counted at every client and every server that should have got a packet.
- **reported lost**: frames and packets that the adapters say were lost or dropped.
- **longest gap**: how long a server heard nothing from the others. **memory**: what the server that grew most had more
  afterwards.

Written by \`bun run chaos --write${args.quick ? " --quick" : ""}\` with seed ${args.seed}, on ${cpus().length} cores with Bun ${Bun.version} and ${versions.join(", ")}.

${table.join("\n")}
`;
}

/** Runs one case at one rate and prints its row. */
async function run(c: Case, rate: number, brokers: Broker[]): Promise<{ row: Row; ok: boolean }> {
  const field = new Field(brokers, new Random(Number(args.seed)), rate, c);
  let cells: Row = [];
  const complaints: string[] = [];
  const errors: string[] = [];
  try {
    const outcome = await field.play();
    errors.push(...outcome.errors);
    const { sent, lost, doubled, reordered, unhandled, stats, gap, growth } = outcome;
    const sum = (of: (stats: AdapterStats) => number) => stats.reduce((sum, s) => sum + of(s), 0);
    cells = [sent, lost, doubled, reordered, unhandled.length, sum((s) => s.lost + s.dropped), sum((s) => s.replayed)];
    cells.push(
      sum(({ reconnects }) => reconnects.consuming + reconnects.publishing),
      `${(gap / 1000).toFixed(1)} s`,
      `${growth > 0 ? "+" : ""}${growth} MB`,
    );
    complaints.push(...unhandled, ...(c.verdict ?? flawless)(outcome), ...outcome.complaints);
    if (growth > GROWTH) complaints.push(`memory grew by ${growth} MB`);
  } catch (error) {
    complaints.push(error instanceof Error ? (error.stack ?? error.message) : String(error));
  } finally {
    complaints.push(...(await field.close()));
  }
  const ok = complaints.length === 0;
  while (cells.length < COLUMNS.length - 4) cells.push("");
  const row = [c.point, c.title, rate, ...cells, ok ? "ok" : "**failed**"];
  printRow(row);
  for (const complaint of complaints) console.error(`  ${c.point} at ${rate}/s: ${complaint}`);
  if (!ok && field.log.length > 0) console.error(`    faults: ${field.log.join("; ")}`);
  if (!ok) for (const error of errors.slice(0, 8)) console.error(`    reported: ${error.slice(0, 240)}`);
  return { row, ok };
}

const whole = ({ lost, where }: Outcome): string[] => (lost === 0 ? [] : [`${lost} lost: ${where.join("; ")}`]);
const ordered = ({ doubled, reordered, odd }: Outcome): string[] =>
  doubled + reordered === 0 ? [] : [`${doubled} doubled, ${reordered} reordered: ${odd.join("; ")}`];
/** Where nothing was lost, nothing may be reported as lost. */
const untroubled = ({ lost, stats }: Outcome): string[] => {
  const reported = stats.reduce((sum, s) => sum + s.lost + s.dropped, 0);
  return lost > 0 || reported === 0 ? [] : [`${reported} reported as lost or dropped, but nothing was`];
};
const arrived = (outcome: Outcome): string[] => [...whole(outcome), ...ordered(outcome)];
const flawless = (outcome: Outcome): string[] => [...arrived(outcome), ...untroubled(outcome)];

// ── The cases ────────────────────────────────────────────────────────────────────────────────────────────────────────

interface Case {
  point: string;
  title: string;
  fault(field: Field): Promise<void>;
  /** Which servers emit; all three by default. */
  senders?: string;
  /** Nodes of the broker. */
  nodes?: number;
  rates?: number[];
  /** How many packets in a row go to the same rooms, so that they can share a frame; 4 or 10 ms worth of them by default. */
  streak?: number;
  options?: Partial<AdapterOptions>;
  /** How far away the broker is, in ms. */
  latency?: number;
  /** In how many more rooms the clients are, each of which is emitted to in turn. */
  rooms?: number;
  /** Whether lost clients are recovered. */
  recovery?: boolean;
  /** Who the servers are to the broker. */
  user?: string;
  /** What is wrong with the outcome; by default anything that was lost, doubled or reordered. */
  verdict?(outcome: Outcome): string[];
}

/** `long` is the length of a long outage, in seconds. */
function cases(long: number): Case[] {
  const outages = [2, long];
  return [
    ...outages.map((s) => ({
      point: "receiver",
      title: `receiver cut for ${s} s`,
      senders: "bc",
      fault: (f: Field) => f.cut([f.a], s),
    })),
    ...outages.map((s) => ({
      point: "sender",
      title: `sender cut for ${s} s`,
      senders: "a",
      fault: (f: Field) => f.cut([f.a], s),
    })),
    ...outages.map((s) => ({
      point: "everybody",
      title: `everybody cut for ${s} s`,
      fault: (f: Field) => f.cut(f.peers, s),
    })),
    ...(["publishing", "consuming"] as const).flatMap((role) =>
      outages.map((s) => ({
        point: role,
        title: `${role} connection cut for ${s} s`,
        fault: (f: Field) => f.cut([f.a], s, role),
      })),
    ),
    { point: "broker", title: "broker stopped and started", fault: (f) => f.restart("stop", 2) },
    { point: "broker", title: "broker killed and started", fault: (f) => f.restart("kill", 2) },
    {
      point: "cluster",
      title: "one node of a cluster of three killed",
      nodes: 3,
      fault: async (f) => {
        await f.brokers[1]?.kill();
        await Bun.sleep(5_000);
        await f.brokers[1]?.start();
      },
    },
    { point: "half-open", title: "half-open link of one, heartbeat 2 s", fault: (f) => f.silence([f.a], 8) },
    { point: "half-open", title: "half-open links of all, heartbeat 2 s", fault: (f) => f.silence(f.peers, 8) },
    { point: "slow", title: "50 ms latency and 1 % stalls", fault: (f) => f.slow(f.peers, long) },
    { point: "alarm", title: "memory alarm", fault: (f) => f.alarm(5) },
    { point: "frozen", title: "receiver stopped for 15 s", senders: "bc", fault: (f) => f.freeze(f.a, 15) },
    { point: "frozen", title: "a server stopped for 15 s", fault: (f) => f.freeze(f.a, 15) },
    ...OPERATIONS.map((operation) => ({
      point: "operator",
      title: `operator ${operation}`,
      fault: (f: Field) => f.operate(operation, f.a),
    })),
    {
      point: "churn",
      title: "1,000 joins and leaves a second, everybody cut",
      fault: async (f) => {
        await f.all("rush");
        await f.cut(f.peers, 2);
        await Bun.sleep(2_000);
      },
    },
    {
      point: "replaced",
      title: "a peer killed, a new one started, everybody cut",
      fault: async (f) => {
        const outage = f.cut(f.peers, 4);
        await Bun.sleep(1_000);
        f.kill(f.c);
        const d = f.add("d");
        d.proxy?.cut();
        void d.do("emit");
        await outage;
        d.proxy?.heal();
        await f.welcome(d);
      },
      verdict: arrived, // what the dead peer did not get out is reported
    },
    {
      point: "rolling",
      title: "all servers restarted, one after the other",
      fault: async (f) => {
        for (const [i, old] of [...f.peers].entries()) {
          const next = f.add("def"[i]!);
          await f.welcome(next);
          await next.do("emit");
          await f.retire(old);
        }
      },
    },
    {
      point: "recovery",
      title: `${ROAMERS} clients come back to any server, ${RETURNS} times each`,
      recovery: true,
      options: { recoveryBytes: 16 * 2 ** 20 }, // less than what `GROWTH` allows
      rates: [170],
      fault: (f) => f.roam(),
    },
    {
      point: "recovery",
      title: `${ROAMERS} clients come back, all servers restarted, one after the other`,
      recovery: true,
      options: { recoveryBytes: 16 * 2 ** 20 }, // less than what `GROWTH` allows
      rates: [170],
      fault: (f) =>
        f.roam(async () => {
          for (const [i, old] of [...f.peers].entries()) {
            const next = f.add("def"[i]!);
            await f.welcome(next);
            await next.do("emit");
            await Bun.sleep(1_000);
            await f.retire(old);
          }
        }),
    },
    ...BURST_FAULTS.map(({ title, strike }) => ({
      point: "burst",
      title: `${BURST.toLocaleString("en")} emits in one loop, ${title}`,
      fault: async (f: Field) => {
        const burst = f.a.do("burst");
        await Bun.sleep(200); // the loop has begun
        await Promise.all([burst, strike(f)]);
      },
    })),
    {
      point: "far",
      title: `broker 50 ms away, ${CROWD.toLocaleString("en")} rooms, everybody cut for 2 s`,
      latency: 50,
      rooms: CROWD,
      streak: 1,
      fault: async (f) => {
        await f.cut(f.peers, 2);
        await Bun.sleep(long * 500);
      },
    },
    {
      point: "random",
      title: `ten random faults in ${long * 15} s`,
      fault: async (f) => {
        const slot = long * 1_500;
        for (let i = 0; i < 10; i++) {
          const end = performance.now() + slot;
          const seconds = f.random.between(0.5, long / 2);
          const fault = f.random.pick(RANDOM_FAULTS);
          await fault(f, seconds);
          await Bun.sleep(end - performance.now());
        }
      },
    },
    {
      point: "beyond",
      title: "20 s outage, journal of 5 s",
      rates: [200],
      streak: 1,
      options: { journal: { ms: 5_000 } },
      fault: (f) => f.cut([f.a], 20),
      verdict: (outcome) => {
        const stats = (name: string) => outcome.stats[outcome.names.indexOf(name)];
        const missed = (pair: string) => outcome.missed[pair] ?? { packets: 0, calls: 0 };
        const complaints = ordered(outcome);
        // What a could not send to either, in packets.
        const unsent = ["b<a", "c<a"].map((pair) => missed(pair).packets + missed(pair).calls);
        const [least, dropped] = [Math.max(...unsent), stats("a")?.dropped ?? 0];
        if (least === 0) complaints.push("nothing was lost: the journal is longer than it should be");
        if (dropped < least || dropped > least + IN_DOUBT)
          complaints.push(`${least} packets of a were lost, ${dropped} reported`);
        // What a missed of b and c, in frames, which held as many packets then as at other times.
        const expected = ["b", "c"].reduce((sum, name) => {
          const { framesSent = 0, packetsSent = 1 } = stats(name) ?? {};
          const { packets, calls } = missed(`a<${name}`);
          return sum + ((packets + calls) * framesSent) / packetsSent;
        }, 0);
        const frames = stats("a")?.lost ?? 0;
        if (Math.abs(frames - expected) > expected / 10)
          complaints.push(`a missed about ${Math.round(expected)} frames, ${frames} reported`);
        return complaints;
      },
    },
    {
      point: "hostile",
      title: `${HOSTILE.toLocaleString("en")} hostile messages`,
      options: { maxPayload: MAX_PAYLOAD },
      fault: bombard,
    },
    ...PERMISSIONS.map((permission) => ({
      point: "denied",
      title: `permission to ${permission} taken away for 8 s`,
      user: USER,
      fault: (f: Field) => f.deny(permission, 8),
      verdict: (outcome: Outcome) => {
        const named = outcome.errors.find((e) => e.includes(permission) && /grant.*socket/.test(e));
        const complaints = flawless(outcome);
        if (!named) complaints.push(`no error names ${permission} and a pattern: ${outcome.errors.join("; ")}`);
        const [attempts] = outcome.attempts;
        if (attempts > 20) complaints.push(`${attempts} attempts to connect in 8 s`);
        return complaints;
      },
    })),
  ];
}

const BURST_FAULTS: { title: string; strike(field: Field): Promise<void> }[] = [
  { title: "everybody cut for 2 s", strike: (f) => f.cut(f.peers, 2) },
  { title: "broker killed and started", strike: (f) => f.restart("kill", 1) },
];

const OPERATIONS = [
  "deletes the queue",
  "closes all channels",
  "closes the consuming connection",
  "closes both connections",
] as const;
type Operation = (typeof OPERATIONS)[number];

const RANDOM_FAULTS: ((field: Field, seconds: number) => Promise<void>)[] = [
  (f, s) => f.cut([f.random.pick(f.peers)], s),
  (f, s) => f.cut([f.random.pick(f.peers)], s, f.random.pick(["consuming", "publishing"])),
  (f, s) => f.cut(f.peers, s),
  (f, s) => f.silence([f.random.pick(f.peers)], s),
  (f, s) => f.slow(f.peers, s),
  (f, s) => f.freeze(f.random.pick(f.peers), s),
  (f, s) => f.restart("stop", s),
  (f, s) => f.restart("kill", s),
  (f, s) => f.alarm(s),
  (f) => f.operate(f.random.pick(OPERATIONS), f.random.pick(f.peers)),
];

/** A seeded generator, https://gist.github.com/tommyettinger/46a874533244883189143505d203312c (mulberry32). */
class Random {
  constructor(private state: number) {}

  next(): number {
    this.state = (this.state + 0x6d2b79f5) | 0;
    let t = Math.imul(this.state ^ (this.state >>> 15), 1 | this.state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  }

  between(from: number, to: number): number {
    return from + this.next() * (to - from);
  }

  below(n: number): number {
    return Math.floor(this.next() * n);
  }

  pick<T>(items: readonly T[]): T {
    return items[this.below(items.length)]!;
  }

  bytes(length: number): Buffer {
    return Buffer.from(Array.from({ length }, () => this.below(256)));
  }
}

// ── Hostile input ────────────────────────────────────────────────────────────────────────────────────────────────────

/** Where things stand in a frame; see "The wire" in index.ts. All numbers are little-endian. */
const FIELDS = { version: 0, kind: 1, sender: 2, number: 10, floor: 16, words: 24, packets: 28, first: 32 };
const VERSION = 2;
const KINDS = { packets: 1, control: 2 };
/** How section kinds with a head of options and with messages between servers are numbered. */
const SECTIONS = { options: 2, messages: 3 };
const MAX_PAYLOAD = 256 * 1024;
const ABSURD = [null, -1, 1e308, 2 ** 53, "", "x", [], {}, [null], true, "9".repeat(1_000), { __proto__: null }];
const HUGE = [2 ** 32 - 1, 2 ** 31, 2 ** 31 + 7, 2 ** 30, 2 ** 30 - 1, 2 ** 20];

function frame(kind: number, sender: string, words: number[], text: string): Buffer {
  const header = Buffer.alloc(FIELDS.first + words.length * 4);
  header.set([VERSION, kind]);
  header.write(sender, FIELDS.sender, "latin1");
  header.writeUInt32LE(words.length, FIELDS.words);
  header.writeUInt32LE(1, FIELDS.packets);
  words.forEach((word, i) => header.writeUInt32LE(word, FIELDS.first + i * 4));
  return Buffer.concat([header, Buffer.from(text)]);
}

/** A volatile frame with one packet for the main namespace. */
const packetFrame = (sender: string, section: number, head: string, part: string): Buffer =>
  frame(KINDS.packets, sender, [1, 1, 0, section + 8 * head.length, 1, part.length], `/${head}${part}`);

interface Hostile {
  body: Buffer | string;
  contentType?: string | undefined;
}

/**
 * Ways to make a message that is malformed, truncated, foreign, oversized or of an unknown version; `real` is a copy of a frame
 * that was really sent. None makes a well-formed frame that lies about its sender or number: who may write is trusted.
 */
const HOSTILITIES: ((random: Random, real: Buffer, uid: string) => Buffer | string | Hostile)[] = [
  (random) => random.bytes(random.below(300)),
  (_, real) => real,
  (random, real) => real.subarray(0, random.below(real.length)),
  (random, real) => unnumbered(real).subarray(0, random.below(real.length)),
  (random, real) => Buffer.concat([unnumbered(real), random.bytes(1 + random.below(100))]),
  // Flipped bits, though not in the sender and the numbers.
  (random, real) => {
    const { words } = FIELDS;
    for (let flips = 1 + random.below(8); flips > 0; flips--)
      real[words + random.below(real.length - words)]! ^= 1 << random.below(8);
    return real;
  },
  // An unknown version, an unknown kind.
  (random, real) => {
    real[FIELDS.version] = random.pick([0, 1, 3, 4, 31, 32, 255]);
    return real;
  },
  (random, real) => {
    unnumbered(real)[FIELDS.kind] = random.pick([0, 2, 3, 4, 255]);
    return real;
  },
  // Huge counts and lengths: of words, sections, predecessors, heads, parts. What is in predecessors harms no reader.
  (random, real) => {
    const { words, first } = FIELDS;
    const word = (i: number) => real.readUInt32LE(first + 4 * i);
    const isPredecessor = (i: number) => i >= 3 + 2 * word(1) && i < 3 + 2 * (word(1) + word(2));
    const all = Array.from({ length: real.readUInt32LE(words) }, (_, i) => i).filter((i) => !isPredecessor(i));
    const field = random.pick([words, ...all.map((i) => first + 4 * i)]);
    unnumbered(real).writeUInt32LE(random.pick(HUGE), field);
    return real;
  },
  // A stranger's, that cannot be read.
  (random, real) => {
    real.write(random.bytes(6).toString("base64url"), FIELDS.sender, "latin1");
    return real.subarray(0, random.below(real.length));
  },
  // Wrong types in what is otherwise well formed.
  (random, _, uid) => {
    const type = random.pick(["hello", "beat", "bye", "ping", "ask", "begin", "nonsense", 7]);
    const fields = ["namespaces", "revision", "number", "floor", "shared", "reply", "rooms", "uid", "id", "from", "to"];
    const control = Object.fromEntries(fields.map((field) => [field, random.pick(ABSURD)]));
    return frame(KINDS.control, uid, [], JSON.stringify({ type, ...control }));
  },
  (random, _, uid) => {
    const type = random.pick(["packet", "join", "emit", "fetch", "broadcast", "sockets", "answer", "ack", "clients"]);
    const opts = random.pick([
      ...ABSURD,
      { rooms: ["north"], except: random.pick(ABSURD), flags: random.pick(ABSURD) },
    ]);
    const fields = ["id", "rooms", "args", "data", "sockets", "value", "count"];
    const message = Object.fromEntries(fields.map((field) => [field, random.pick([...ABSURD, ["nobody"]])]));
    return packetFrame(uid, SECTIONS.messages, "", JSON.stringify({ type, opts, ...message }));
  },
  (random, _, uid) => {
    const head = [["north"], [], {}].map((part) => (random.below(2) ? random.pick(ABSURD) : part));
    return packetFrame(uid, random.pick([SECTIONS.options, 5, 6, 7]), JSON.stringify(head), '2["n"]');
  },
  (random, _, uid) => packetFrame(uid, random.below(8), "[".repeat(random.below(5_000)), "[".repeat(5_000)),
  (random, _, uid) => frame(KINDS.control, uid, [], "[".repeat(random.below(20_000))),
  // Larger than maxPayload; seldom, for it takes time.
  (random, real) => (random.below(50) === 0 ? Buffer.concat([real, Buffer.alloc(MAX_PAYLOAD)]) : real),
  (random) => (random.below(50) === 0 ? `["n","${"x".repeat(MAX_PAYLOAD)}"]` : ""),
  // What any client may send, and should not.
  (random) => JSON.stringify(random.pick(ABSURD)),
  (random) => JSON.stringify([random.pick(["disconnect", "connect", "n", 7, null, "x"]), ...ABSURD]),
  (random) => "[".repeat(random.below(20_000)) + "]".repeat(random.below(20_000)),
  (random, real) => ({ body: real, contentType: random.pick(["application/json", "text/plain", ""]) }),
  (random) => ({
    body: random.pick(["<html>", "hello", "\0", ""]),
    contentType: random.pick(["text/html", undefined]),
  }),
];

/** Without a number a frame is volatile, so that it is read, whatever has come before. */
function unnumbered(real: Buffer): Buffer {
  return real.fill(0, FIELDS.number, FIELDS.words);
}

/** Sends hostile messages to the servers' queues and to all kinds of exchanges. */
async function bombard({ broker, random }: Field): Promise<void> {
  const connection = await connect(broker.url);
  connection.on("error", () => {}); // what is under way rejects
  const channel = await connection.createConfirmChannel();
  const { queue } = await channel.assertQueue("", { exclusive: true });
  await channel.bindQueue(queue, PREFIX, "");
  const captured: Buffer[] = [];
  const capture = (content: Buffer) => {
    const isNumbered = content[FIELDS.kind] === KINDS.packets && content.readUIntLE(FIELDS.number, 6) > 0;
    if (isNumbered) captured.push(content);
  };
  await channel.consume(queue, (message) => message && capture(message.content), { noAck: true });
  await Bun.sleep(3_000);
  await channel.deleteQueue(queue);

  const own = `${PREFIX}#@`;
  const queues = (await broker.queues(own)).map(({ name }) => name);
  const uids = queues.map((name) => name.slice(own.length, name.lastIndexOf(".")));
  const keys = ["", "/", "@", "/#north", "/#nobody", ...uids.map((uid) => `@${uid}`)];
  const room = `${PREFIX}#/#north`;
  const rooms = (await broker.exchanges(room)).includes(room) ? [room] : [];
  const send = (channel: ConfirmChannel) => {
    const made = random.pick(HOSTILITIES)(random, Buffer.from(random.pick(captured)), random.pick(uids));
    const { body, contentType }: Hostile =
      typeof made === "string"
        ? { body: made, contentType: "application/json" }
        : Buffer.isBuffer(made)
          ? { body: made }
          : made;
    const to = random.pick(["", PREFIX, KEYS, ...rooms]);
    const CC = random.below(10) === 0 ? [random.pick(keys), random.pick(keys)] : undefined;
    channel.publish(to, random.pick(to === "" ? queues : keys), Buffer.from(body), { contentType, CC });
  };
  let failures = 0;
  for (let sent = 0; sent < HOSTILE;) {
    const channel = await connection.createConfirmChannel();
    channel.on("error", () => {});
    try {
      for (let i = 0; i < VOLLEY; i++) send(channel);
      await channel.waitForConfirms();
      await channel.close();
      sent += VOLLEY;
    } catch (error) {
      if (++failures > 10) throw error; // a room's exchange may be gone for a moment
    }
  }
  await connection.close();
}

// ── The field: servers, links and brokers ────────────────────────────────────────────────────────────────────────────

/** What became of all packets. */
interface Outcome {
  sent: number;
  /** Packets and servers' own messages, each as often as somebody missed it. */
  lost: number;
  where: string[];
  doubled: number;
  reordered: number;
  /** The first ones of them. */
  odd: string[];
  /** Lost between two servers, `<receiver><<sender>`, however many clients waited. */
  missed: Record<string, { packets: number; calls: number }>;
  unhandled: string[];
  errors: string[];
  complaints: string[];
  /** Of the servers that have stayed, and their statistics. */
  names: string[];
  stats: AdapterStats[];
  /** Connections that were tried, by server, while permission was denied. */
  attempts: [number, ...number[]];
  /** The longest time in ms in which a server heard nothing from the others. */
  gap: number;
  /** Of the server that grew most, after the traffic, in MB. */
  growth: number;
}

/** A server's process, as the field sees it. */
class Peer {
  dead = false;
  readonly #answers: PromiseWithResolvers<Report>[] = [];
  readonly #process: Bun.Subprocess;

  constructor(
    readonly settings: ServerSettings,
    readonly proxy: Proxy | undefined,
  ) {
    this.#process = Bun.spawn([process.execPath, import.meta.path, "--server", JSON.stringify(settings)], {
      stdio: ["ignore", "inherit", "inherit"],
      ipc: (report: Report) => this.#answers.shift()?.resolve(report),
      onExit: () => {
        this.dead = true;
        for (const answer of this.#answers) answer.reject(new Error(`server ${settings.name} ended`));
      },
    });
  }

  do(command: Command): Promise<Report> {
    const answer = Promise.withResolvers<Report>();
    this.#answers.push(answer);
    this.#process.send(command);
    const late = setTimeout(() => answer.reject(new Error(`${this.settings.name} did not ${command}`)), 60_000);
    return answer.promise.finally(() => clearTimeout(late));
  }

  signal(signal: NodeJS.Signals): void {
    this.#process.kill(signal);
  }

  get ended(): Promise<number> {
    return this.#process.exited;
  }
}

class Field {
  /** Those that are alive. */
  readonly peers: Peer[] = [];
  /** What was done when, for a failure's report. */
  readonly log: string[] = [];
  readonly complaints: string[] = [];
  /** Where the servers listen that take clients. */
  readonly #ports = new Map<string, number>();
  readonly #start = performance.now();
  /** What the others had sent when a newcomer was ready, by its name. */
  readonly #since = new Map<string, Report[]>();
  /** The last reports of servers that were closed. */
  readonly #retired: Report[] = [];
  readonly #attempts: number[] = [];
  readonly #proxies: Proxy[] = [];

  constructor(
    readonly brokers: Broker[],
    readonly random: Random,
    readonly rate: number,
    readonly of: Case,
  ) {}

  get broker(): Broker {
    return this.brokers[0]!;
  }

  get a(): Peer {
    return this.#named("a");
  }

  get c(): Peer {
    return this.#named("c");
  }

  #named(name: string): Peer {
    const peer = this.peers.find((peer) => peer.settings.name === name);
    if (!peer) throw new Error(`no server ${name}`);
    return peer;
  }

  async play(): Promise<Outcome> {
    if (this.of.user) {
      await this.broker.ctl("add_user", this.of.user, this.of.user).catch(() => {}); // there already
      await this.grant();
    }
    if (this.brokers.length === 1) for (const _ of "abcdef") this.#proxies.push(await Proxy.open(this.broker.port));
    this.#keepAway(this.of.latency);
    for (const name of "abc") this.add(name);
    for (const { name, port } of await this.all("ready")) this.#ports.set(name, port);
    const senders = this.peers.filter(({ settings }) => (this.of.senders ?? "abc").includes(settings.name));
    for (const sender of senders) await sender.do("emit");
    await Bun.sleep(BEFORE * 1_000);
    const before = new Map((await this.all("report")).map(({ name, memory }) => [name, memory]));
    await this.of.fault(this);
    await Bun.sleep(AFTER * 1_000);
    const sent = [...(await this.all("stop")), ...this.#retired];
    const reports = await this.#settled(sent);
    const { lost, missed, where } = this.#shortfall(reports, sent);
    const streams = reports.flatMap((report) => Object.values(report.streams));
    const { complaints } = this;
    let growth = Infinity;
    const grown = async () => {
      const grown = (await this.all("report")).map(({ name, memory }) => memory - (before.get(name) ?? memory));
      growth = Math.round(Math.max(...grown));
      return growth;
    };
    await until(async () => (await grown()) < GROWTH, FORGETTING);
    this.#keepAway(); // or binding many rooms takes minutes
    const bound = async () => (await this.all("report")).reduce((sum, { rooms }) => sum + rooms, 0);
    const patience = this.of.rooms ? 60 : 10;
    if (!(await until(async () => (await this.#bound()) === (await bound()), patience)))
      complaints.push(
        `${await this.#bound()} rooms are bound on the broker instead of ${await bound()}; in the servers' eyes ` +
          (await this.all("report"))
            .map(({ name, rooms, stats }) => `${stats.rooms} of ${rooms} of ${name}`)
            .join(", "),
      );
    const catchAll = async () =>
      (await this.broker.bindings(PREFIX)).some((b) => b.source === PREFIX && b.kind === "queue");
    if (!(await until(async () => !(await catchAll()), patience))) complaints.push("a queue still takes everything");
    for (const { name, closed, foreign } of reports) {
      if (closed > 0) complaints.push(`${closed} clients of ${name} were disconnected`);
      if (foreign > 0 && this.of.point !== "hostile") complaints.push(`${foreign} packets reached ${name} garbled`);
    }
    return {
      sent: sent.reduce((sum, report) => sum + report.sent, 0),
      lost,
      where,
      missed,
      doubled: streams.reduce((sum, stream) => sum + stream.doubled, 0),
      reordered: streams.reduce((sum, stream) => sum + stream.reordered, 0),
      odd: reports.flatMap(({ name, streams }) =>
        Object.entries(streams).flatMap(([pair, { odd }]) =>
          odd.length > 0 ? `${name}.${pair}: ${odd.join(", ")}` : [],
        ),
      ),
      unhandled: [...reports, ...this.#retired].flatMap((report) => report.unhandled),
      errors: [...new Set(reports.flatMap((report) => report.errors))],
      complaints,
      names: reports.map((report) => report.name),
      stats: reports.map((report) => report.stats),
      attempts: this.#attempts as [number, ...number[]],
      gap: Math.max(...reports.map((report) => report.gap)),
      growth,
    };
  }

  /** Closes all servers; gives what they left on the broker. */
  async close(): Promise<string[]> {
    const left = new Set<string>();
    const ended = async (peer: Peer) =>
      this.#end(peer).catch((error: Error) => {
        left.add(error.message);
        peer.signal("SIGKILL");
        return peer.ended;
      });
    await Promise.all(this.peers.map(ended));
    for (const proxy of this.#proxies) proxy.close();
    const traces = async () => [
      ...(await this.broker.exchanges(PREFIX)).filter((name) => !STAYING.includes(name)),
      ...(await this.broker.queues(PREFIX)).map((queue) => queue.name),
    ];
    await until(async () => (await traces()).length === 0);
    for (const trace of await traces()) left.add(`${trace} is left on the broker`);
    return [...left];
  }

  async #end(peer: Peer): Promise<void> {
    void peer.do("close").catch(() => {}); // it ends instead of answering
    if (!(await until(() => peer.dead, 30))) throw new Error(`server ${peer.settings.name} did not end`);
  }

  #keepAway(latency = 0): void {
    for (const proxy of this.#proxies) proxy.latency = latency;
  }

  /** Starts a server: behind a proxy of its own, or on a node of its own. */
  add(name: string): Peer {
    const index = name.charCodeAt(0) - "a".charCodeAt(0);
    const proxy = this.#proxies[index];
    const { user = "guest", options = {}, rooms = 0, recovery = false } = this.of;
    const { streak = Math.max(4, this.rate / 100) } = this.of;
    const ports = proxy
      ? [proxy.port]
      : this.brokers.map((_, i) => this.brokers[(i + index) % this.brokers.length]!.port);
    const urls = ports.map((port) => `amqp://${user}:${user}@127.0.0.1:${port}?heartbeat=2`);
    const peer = new Peer({ name, urls, streak, rate: this.rate, rooms, recovery, options }, proxy);
    this.peers.push(peer);
    return peer;
  }

  /** From when it is ready, a new server gets everything. */
  async welcome(peer: Peer): Promise<void> {
    const { name, port } = await peer.do("ready");
    this.#ports.set(name, port);
    const others = (await this.all("report")).filter(({ name }) => name !== peer.settings.name);
    this.#since.set(peer.settings.name, [...others, ...this.#retired]);
  }

  /** Closes a server that has just emitted. The others get all that it has sent. */
  async retire(peer: Peer): Promise<void> {
    this.#note("close", [peer]);
    this.#ports.delete(peer.settings.name);
    this.peers.splice(this.peers.indexOf(peer), 1);
    this.#retired.push(await peer.do("stop"));
    await this.#end(peer);
  }

  all(command: Command): Promise<Report[]> {
    return Promise.all(this.peers.map((peer) => peer.do(command)));
  }

  // Faults: each lasts some seconds and leaves everything working.

  #note(fault: string, peers: Peer[], seconds?: number): void {
    const names = peers.map(({ settings }) => settings.name).join("");
    const length = seconds === undefined ? "" : ` for ${seconds.toFixed(1)} s`;
    this.log.push(`${((performance.now() - this.#start) / 1_000).toFixed(1)} s: ${fault} ${names}${length}`);
  }

  async cut(peers: Peer[], seconds: number, role?: Role): Promise<void> {
    this.#note(`cut ${role ?? "both"}`, peers, seconds);
    for (const { proxy } of peers) proxy?.cut(role);
    await Bun.sleep(seconds * 1_000);
    for (const { proxy } of peers) proxy?.heal();
  }

  /** Clients lose their connections and come back to any server, again and again. Each has to be recovered, and to get everything. */
  async roam(meanwhile?: () => Promise<void>): Promise<void> {
    const names = new Set(this.#ports.keys());
    const port = () => this.random.pick([...this.#ports.values()]);
    const roamers = Array.from({ length: ROAMERS }, () => new Roamer(names));
    await Promise.all(roamers.map((roamer) => roamer.comeBack(port)));
    await Bun.sleep(BEFORE * 1_000); // each has heard something, or it could not be recovered
    let isOver = meanwhile === undefined;
    const rest = meanwhile?.().finally(() => (isOver = true));
    await Promise.all(
      roamers.map(async (roamer) => {
        for (let i = 0; i < RETURNS || !isOver; i++) {
          await Bun.sleep(this.random.below(STAY));
          await roamer.leave();
          await Bun.sleep(this.random.below(AWAY));
          await roamer.comeBack(port);
        }
      }),
    );
    await rest;
    const sent = [...(await this.all("stop")), ...this.#retired];
    const lacks = () => roamers.flatMap((roamer) => roamer.lacks(sent));
    await until(() => lacks().length === 0, PATIENCE);
    const returns = roamers.reduce((sum, { returns }) => sum + returns, 0);
    this.#note(`${returns} returns`, []);
    this.complaints.push(...lacks(), ...roamers.flatMap((roamer) => roamer.complaints));
    await Promise.all(roamers.map((roamer) => roamer.leave()));
  }

  async silence(peers: Peer[], seconds: number): Promise<void> {
    this.#note("silence", peers, seconds);
    for (const { proxy } of peers) proxy?.silence();
    await Bun.sleep(seconds * 1_000);
  }

  async slow(peers: Peer[], seconds: number): Promise<void> {
    this.#note("slow", peers, seconds);
    for (const { proxy } of peers) if (proxy) Object.assign(proxy, { latency: 50, stalls: 0.01 });
    await Bun.sleep(seconds * 1_000);
    for (const { proxy } of peers) if (proxy) Object.assign(proxy, { latency: 0, stalls: 0 });
  }

  async freeze(peer: Peer, seconds: number): Promise<void> {
    this.#note("freeze", [peer], seconds);
    peer.signal("SIGSTOP");
    await Bun.sleep(seconds * 1_000);
    peer.signal("SIGCONT");
  }

  async restart(how: "stop" | "kill", seconds: number): Promise<void> {
    this.#note(`broker ${how}`, [], seconds);
    await this.broker[how]();
    await Bun.sleep(seconds * 1_000);
    await this.broker.start();
  }

  async alarm(seconds: number): Promise<void> {
    this.#note("alarm", [], seconds);
    await this.broker.ctl("set_vm_memory_high_watermark", "0.000001");
    await Bun.sleep(seconds * 1_000);
    await this.broker.ctl("set_vm_memory_high_watermark", "0.4");
  }

  kill(peer: Peer): void {
    peer.signal("SIGKILL");
    this.peers.splice(this.peers.indexOf(peer), 1);
  }

  async operate(operation: Operation, peer: Peer): Promise<void> {
    this.#note(operation, [peer]);
    const { proxy } = peer;
    const rows = async (list: string, ...columns: string[]) =>
      (await this.broker.ctl("-q", list, ...columns, "--no-table-headers")).split("\n").map((row) => row.split("\t"));
    const connections = await rows("list_connections", "pid", "peer_port");
    const pids = (role?: Role) => {
      const ports = proxy?.ports(role) ?? [];
      return connections.flatMap(([pid = "", port]) => (ports.includes(Number(port)) ? pid : []));
    };
    const owned = async (list: string, column: string, owner: string) =>
      (await rows(list, column, owner)).flatMap(([row = "", pid = ""]) => (pids().includes(pid) ? row : []));
    let victims: string[];
    let strike = (pid: string) => this.broker.ctl("close_connection", pid, "by the operator");
    switch (operation) {
      case "deletes the queue":
        victims = await owned("list_queues", "name", "owner_pid");
        strike = (queue) => this.broker.ctl("delete_queue", queue);
        break;
      case "closes all channels": {
        const error = '{amqp_error, precondition_failed, "closed by the operator", none}';
        const channels = await owned("list_channels", "pid", "connection");
        victims = [channels.map((pid) => `"${pid}"`).join()];
        strike = (all) => this.broker.ctl("eval", `[exit(rabbit_misc:string_to_pid(P), ${error}) || P <- [${all}]].`);
        break;
      }
      case "closes the consuming connection":
        victims = pids("consuming");
        break;
      case "closes both connections":
        victims = pids();
    }
    if (!victims[0]) throw new Error(`the operator found nothing: ${operation}`);
    await Promise.all(victims.map(strike));
  }

  async grant(denied?: string): Promise<void> {
    const patterns = PERMISSIONS.map((permission) => (permission === denied ? "^$" : GRANTED));
    await this.broker.ctl("set_permissions", USER, ...patterns);
  }

  /** The broker asks for permissions again on new connections. */
  async deny(permission: string, seconds: number): Promise<void> {
    await this.grant(permission);
    await this.broker.ctl("close_all_user_connections", USER, "permissions have changed");
    const before = this.#proxies.map((proxy) => proxy.attempts);
    await Bun.sleep(seconds * 1_000);
    this.#attempts.push(...this.#proxies.map((proxy, i) => proxy.attempts - before[i]!));
    await this.grant();
  }

  /** Waits until all has arrived, or nothing has for a while. */
  async #settled(sent: Report[]): Promise<Report[]> {
    let reports = await this.all("report");
    let before = this.#shortfall(reports, sent).lost;
    for (let since = performance.now(); before > 0 && performance.now() - since < PATIENCE * 1_000;) {
      await Bun.sleep(100);
      reports = await this.all("report");
      const { lost } = this.#shortfall(reports, sent);
      if (lost < before) since = performance.now();
      before = lost;
    }
    return reports;
  }

  /** What has not arrived: per listener, and per pair of servers. */
  #shortfall(reports: Report[], sent: Report[]): Pick<Outcome, "lost" | "missed" | "where"> {
    const where: string[] = [];
    let lost = 0;
    const missed: Outcome["missed"] = {};
    for (const { name, streams } of reports) {
      for (const { name: sender, ...total } of sent) {
        const since = this.#since.get(name)?.find((report) => report.name === sender);
        const missing = (listener: string, what: "sent" | "calls") => {
          const { last, gaps } = streams[`${listener}<${sender}`] ?? { last: 0, gaps: [] };
          const owed = [...gaps, [last + 1, total[what]] as const]
            .map(([from, to]) => [Math.max(from, (since?.[what] ?? 0) + 1), to] as const)
            .filter(([from, to]) => from <= to);
          const sum = owed.reduce((sum, [from, to]) => sum + to - from + 1, 0);
          const ranges = owed.slice(0, 3).map((gap) => gap.join("–"));
          if (owed.length > 3) ranges.push("…");
          if (sum > 0) where.push(`${listener} of ${name} lacks ${sum} of ${sender}: ${ranges.join(", ")}`);
          lost += sum;
          return sum;
        };
        const packets = Math.max(...CLIENTS.map((client) => missing(client, "sent")));
        missed[`${name}<${sender}`] = { packets, calls: sender !== name ? missing("server", "calls") : 0 };
      }
    }
    return { lost, missed, where };
  }

  /** How many rooms of servers are bound on the broker: by a key, or through the room's exchange. */
  async #bound(): Promise<number> {
    const bindings = (await this.broker.bindings(PREFIX)).filter(({ kind }) => kind === "queue");
    return bindings.filter(({ source, key }) => (source === KEYS ? key.includes("#") : source !== PREFIX)).length;
  }
}

/** Whether it came true within some seconds. */
async function until(condition: () => boolean | Promise<boolean>, seconds = 10): Promise<boolean> {
  for (const end = performance.now() + seconds * 1_000; performance.now() < end; await Bun.sleep(50))
    if (await condition()) return true;
  return condition();
}

// ── One server ───────────────────────────────────────────────────────────────────────────────────────────────────────

interface ServerSettings {
  name: string;
  urls: string[];
  rate: number;
  streak: number;
  /** In how many more rooms the clients are. */
  rooms: number;
  /** Whether it takes clients from outside as well, and recovers them. */
  recovery: boolean;
  options: Partial<AdapterOptions>;
}

/** `rush` is ten times as many joins and leaves, `burst` many emits in one loop. */
type Command = "ready" | "emit" | "rush" | "burst" | "stop" | "report" | "close";

interface Report {
  name: string;
  /** Packets, and messages to the servers. */
  sent: number;
  calls: number;
  /** By `<listener><<sender>`. */
  streams: Record<string, Pick<Stream, "last" | "doubled" | "reordered" | "odd" | "gaps">>;
  unhandled: string[];
  errors: string[];
  stats: AdapterStats;
  rooms: number;
  /** Clients that were disconnected, and packets that no server has sent. */
  closed: number;
  foreign: number;
  gap: number;
  /** MB. */
  memory: number;
  /** Where it listens; 0 if it does not. */
  port: number;
}

/** What one listener has got of one server: numbers that grow by one. */
class Stream {
  last = 0;
  doubled = 0;
  reordered = 0;
  /** The first ones that were doubled or reordered. */
  readonly odd: string[] = [];
  readonly #missing = new Set<number>();

  take(n: number): void {
    if (n > this.last) {
      for (let missed = this.last + 1; missed < n; missed++) this.#missing.add(missed);
      this.last = n;
      return;
    }
    const late = this.#missing.delete(n);
    if (late) this.reordered++;
    else this.doubled++;
    if (this.odd.length < 5) this.odd.push(`${n} ${late ? "late" : "again"} after ${this.last}`);
  }

  /** From and to, of what has not come. */
  get gaps(): [number, number][] {
    const gaps: [number, number][] = [];
    for (const n of this.#missing) {
      const gap = gaps.at(-1);
      if (gap?.[1] === n - 1) gap[1] = n;
      else gaps.push([n, n]);
    }
    return gaps;
  }
}

/** A client without a network: the least of an Engine.IO connection that Socket.IO needs, so that counting costs little. */
class Client extends EventEmitter {
  readonly id = crypto.randomUUID();
  readonly protocol = 4;
  readonly transport = { writable: true };
  readyState = "open";
  #event: unknown[] | undefined;

  constructor(readonly onEvent: (args: unknown[]) => void) {
    super();
  }

  /** An event, `2["name",…]`, or one with a binary attachment, `51-["name",…]`, which comes next. */
  write(part: string | Uint8Array): void {
    if (typeof part !== "string")
      return this.onEvent((this.#event ?? []).map((value) => (typeof value === "object" ? part : value)));
    if (part.startsWith("2")) this.onEvent(JSON.parse(part.slice(1)) as unknown[]);
    if (part.startsWith("51-")) this.#event = JSON.parse(part.slice(3)) as unknown[];
  }

  close(): void {
    this.readyState = "closed";
    this.emit("close", "transport close");
  }
}

/** A client with a network, whose connection is lost again and again. */
class Roamer {
  returns = -1;
  readonly complaints: string[] = [];
  readonly #streams = new Map<string, Stream>();
  readonly #socket: ClientSocket;

  /** `others` have emitted before it came. */
  constructor(others: ReadonlySet<string>) {
    const manager = new Manager("", { transports: ["websocket"], reconnection: false, autoConnect: false });
    this.#socket = manager.socket("/", { auth: { roams: true } });
    this.#socket.on("n", (sender: string, n: number, proof: unknown) => {
      const given = proof instanceof Uint8Array ? Buffer.from(proof).readUInt32BE() : proof;
      if (given !== seal(sender, n)) this.complaints.push(`a garbled packet ${n} of ${sender}`);
      let stream = this.#streams.get(sender);
      if (!stream) this.#streams.set(sender, (stream = new Stream()));
      if (stream.last === 0 && others.has(sender)) stream.last = n - 1;
      stream.take(n);
    });
  }

  async leave(): Promise<void> {
    if (!this.#socket.connected) return; // its server has closed
    const { promise, resolve } = Promise.withResolvers();
    this.#socket.once("disconnect", resolve);
    this.#socket.io.engine.close();
    await promise;
  }

  /** Connects to the first server that takes it. */
  async comeBack(port: () => number): Promise<void> {
    for (let isConnected = false; !isConnected;) {
      const { promise, resolve } = Promise.withResolvers<boolean>();
      const { io: manager } = this.#socket;
      Object.assign(manager, { uri: `http://127.0.0.1:${port()}` });
      const failed = () => resolve(false);
      this.#socket.once("connect", () => resolve(true)).once("connect_error", failed);
      manager.once("close", failed); // the server closes, before it has answered
      this.#socket.connect();
      isConnected = await promise;
      manager.off("close", failed);
      this.#socket.off("connect").off("connect_error");
    }
    if (this.returns++ >= 0 && !this.#socket.recovered)
      this.complaints.push(`return ${this.returns} was not recovered`);
  }

  /** What is wrong with what it has heard, once all was sent. */
  lacks(sent: Report[]): string[] {
    return sent.flatMap(({ name, sent }) => {
      const { last, gaps, doubled, reordered, odd } = this.#streams.get(name) ?? new Stream();
      const isWhole = last === sent && gaps.length === 0 && doubled + reordered === 0;
      const ranges = [...gaps, [last + 1, sent]].map((gap) => gap.join("–"));
      return isWhole ? [] : `a client of ${sent} packets of ${name} lacks ${ranges.join(", ")}; ${odd.join(", ")}`;
    });
  }
}

const CLIENTS = ["client1", "client2"];
const ROOMS = ["north", "south"];
const HALLS = Array.from({ length: 40 }, (_, i) => `hall${i}`);

/** Proves that a packet is one of ours. */
const seal = (name: string, n: number): number => Bun.hash.crc32(`${name} ${n}`);

function sealed(name: string, n: number): Buffer {
  const attachment = Buffer.alloc(16);
  attachment.writeUInt32BE(seal(name, n));
  return attachment;
}

async function serve({ name, urls, rate, streak, rooms, recovery, options }: ServerSettings): Promise<void> {
  const unhandled: string[] = [];
  for (const event of ["unhandledRejection", "uncaughtException"])
    process.on(event, (error: unknown) => unhandled.push(`${name}: ${event}: ${Bun.inspect(error)}`));
  const abandoned = () => process.exit();
  process.on("disconnect", abandoned);

  let attempt = 0;
  const amqpConnection = () => connect(urls[attempt++ % urls.length]!, { noDelay: true });
  const adapterOf = createAdapter({ amqpConnection, ...options });
  const io = new Server({ adapter: adapterOf, serveClient: false, ...(recovery && { connectionStateRecovery: {} }) });
  const engine = Object.assign(new EventEmitter(), { close() {} });
  io.bind(engine);
  const adapter = io.of("/").adapter as AmqpAdapter;
  const errors = new Set<string>();
  adapter.on("error", (error: Error) => errors.size < 1_000 && errors.add(error.message));

  const streams = new Map<string, Stream>();
  let foreign = 0;
  let closed = 0;
  let gap = 0;
  let heard = 0;
  const take = (listener: string, [event, sender, n, proof]: unknown[]) => {
    const expected = typeof sender === "string" && typeof n === "number" ? seal(sender, n) : undefined;
    const given = proof instanceof Uint8Array ? Buffer.from(proof).readUInt32BE() : proof;
    if (event !== "n" || expected === undefined || given !== expected) return void foreign++;
    if (sender !== name) {
      const now = performance.now();
      if (heard > 0) gap = Math.max(gap, now - heard);
      heard = now;
    }
    const key = `${listener}<${sender as string}`;
    let stream = streams.get(key);
    if (!stream) streams.set(key, (stream = new Stream()));
    stream.take(n as number);
  };

  const crowd = Array.from({ length: rooms }, (_, i) => `crowd${i}`);
  // Counted clients stay in their rooms; one more comes and goes.
  const joined = Promise.withResolvers<void>();
  let waiting = CLIENTS.length + 1;
  let wander = () => {};
  io.on("connection", async (socket) => {
    const { auth } = socket.handshake;
    if (!auth.roams) socket.on("disconnect", () => closed++);
    if (socket.recovered) return;
    if (!auth.wanders) await socket.join([...ROOMS, ...crowd]);
    else
      wander = () => {
        const hall = HALLS[Math.floor(Math.random() * HALLS.length)]!;
        void (socket.rooms.has(hall) ? socket.leave(hall) : socket.join(hall));
      };
    if (--waiting === 0) joined.resolve();
  });
  io.on("n", (...args: unknown[]) => take("server", ["n", ...args]));
  const open = (client: Client, auth: object) => {
    engine.emit("connection", client);
    client.emit("data", `0${JSON.stringify(auth)}`); // connects to the namespace
  };
  for (const listener of CLIENTS) open(new Client((event) => take(listener, event)), {});
  open(new Client(() => {}), { wanders: true });
  let wandering = setInterval(() => wander(), 10);
  const http = recovery ? createServer().listen(0, "127.0.0.1") : undefined;
  if (http) io.attach(http);

  let sent = 0;
  let calls = 0;
  let timer: Timer | undefined;
  const destinations = [io.to("north"), io.to("south"), io.to(ROOMS), io, ...crowd.map((room) => io.to(room))];
  const emit = () => {
    const n = ++sent;
    destinations[Math.floor(n / streak) % destinations.length]?.emit(
      "n",
      name,
      n,
      n % 5 === 0 ? sealed(name, n) : seal(name, n),
    );
    if (n % (streak * 5) === 0) io.serverSideEmit("n", name, ++calls, seal(name, calls));
  };

  const report = (): Report => ({
    name,
    sent,
    calls,
    streams: Object.fromEntries(
      [...streams].map(([key, { last, doubled, reordered, odd, gaps }]) => [
        key,
        { last, doubled, reordered, odd, gaps },
      ]),
    ),
    unhandled,
    errors: [...errors],
    stats: { ...adapter.stats, lastError: undefined },
    rooms: adapter.roomsByKey.size,
    closed,
    foreign,
    gap,
    memory: process.memoryUsage.rss() / 1e6,
    port: (http?.address() as AddressInfo | undefined)?.port ?? 0,
  });

  const commands: Record<Command, () => unknown> = {
    ready: () => Promise.all([adapter.ready, joined.promise, http && (http.listening || once(http, "listening"))]),
    emit: () => {
      let due = 0;
      let last = performance.now();
      timer = setInterval(() => {
        const now = performance.now();
        due += (Math.min(now - last, 100) * rate) / 1_000; // a process that was stopped does not catch up
        last = now;
        for (; due >= 1; due--) emit();
      }, 5);
    },
    burst: () => {
      for (let i = 0; i < BURST; i++) emit();
    },
    rush: () => {
      clearInterval(wandering);
      wandering = setInterval(() => wander(), 1);
    },
    stop: () => {
      clearInterval(timer);
      clearInterval(wandering);
      timer = undefined;
      Bun.gc(true);
    },
    report: () => timer ?? Bun.gc(true),
    close: async () => {
      await commands.stop();
      await io.close();
      process.off("disconnect", abandoned); // has to end by itself
      process.disconnect?.();
    },
  };
  process.on("message", async (command: Command) => {
    await commands[command]();
    if (command !== "close") process.send?.(report());
  });
}

// Last, for it needs all of the above.
if (args.server) await serve(JSON.parse(args.server) as ServerSettings);
else await main();
