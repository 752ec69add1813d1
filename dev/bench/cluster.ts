/** The processes of a cluster, as bench.ts sees them. */
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { createServer, type AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Place } from "./transports.ts";
import type { Commands } from "./worker.ts";

/** The processes of a cluster share a mapped file, so that progress costs no message. It holds numbers: */
export const SLOTS = 16; // how many packets were received, one for each process;
export const SAMPLES = 32_768; // when packets were sent; when they were received (ms)

export interface Start {
  place: Place;
  /** The mapped file. */
  shared: string;
  slot: number;
}
export interface Call {
  id: number;
  command: keyof Commands;
  args: unknown[];
}
export interface Answer {
  id: number;
  result?: unknown;
  error?: string;
}

export interface Worker {
  call<C extends keyof Commands>(
    command: C,
    ...args: Parameters<Commands[C]>
  ): Promise<Awaited<ReturnType<Commands[C]>>>;
  close(): Promise<void>;
}

async function startWorker(start: Start): Promise<Worker> {
  const calls = new Map<number, PromiseWithResolvers<unknown>>([[0, Promise.withResolvers()]]);
  // Peers are installed at run time, which Bun does by itself only where there is no node_modules; `fallback` looks there
  // first. What comes from Bun's cache finds its own dependencies in the cache, socket.io-adapter too.
  const flags = ["--install=fallback", "--prefer-offline"];
  const { transport, profile } = start.place;
  if (profile)
    flags.push("--cpu-prof-md", `--cpu-prof-dir=${profile}`, `--cpu-prof-name=${transport}-${start.slot}.md`);
  const command = [process.execPath, ...flags, join(import.meta.dir, "worker.ts"), JSON.stringify(start)];
  const child = Bun.spawn(command, {
    stdio: ["ignore", "inherit", "inherit"],
    ipc({ id, result, error }: Answer) {
      if (error === undefined) calls.get(id)?.resolve(result);
      else calls.get(id)?.reject(new Error(`${transport}: ${error}`));
      calls.delete(id);
    },
    onExit(_, code) {
      for (const { reject } of calls.values()) reject(new Error(`a ${transport} process ended (${code})`));
    },
  });
  let id = 0;
  const worker: Worker = {
    call(command, ...args) {
      const answer = Promise.withResolvers<unknown>();
      calls.set(++id, answer);
      child.send({ id, command, args } satisfies Call);
      return answer.promise as ReturnType<typeof worker.call<typeof command>>;
    },
    async close() {
      child.disconnect();
      await child.exited;
    },
  };
  await calls.get(0)?.promise;
  return worker;
}

/** Servers with the same transport and prefix, each a process of its own; the slot of one is its index. */
export class Cluster implements AsyncDisposable {
  readonly workers: Worker[] = [];
  static #count = 0;

  private constructor(
    readonly place: Place,
    readonly folder: string,
  ) {}

  static async open(servers: number, place: Omit<Place, "prefix">): Promise<Cluster> {
    const folder = await mkdtemp(join(tmpdir(), "bench-"));
    await Bun.write(join(folder, "shared"), new Uint8Array((SLOTS + 2 * SAMPLES) * 8));
    const cluster = new Cluster({ ...place, prefix: `bench${++Cluster.#count}` }, folder);
    for (let i = 0; i < servers; i++) await cluster.add();
    return cluster;
  }

  async add(place: Partial<Place> = {}): Promise<Worker> {
    const slot = this.workers.length;
    const worker = await startWorker({ place: { ...this.place, ...place }, shared: join(this.folder, "shared"), slot });
    this.workers.push(worker);
    return worker;
  }

  /** When each packet of the last `pace` was sent and received, in ms. */
  async times(count: number): Promise<{ sent: number; received: number }[]> {
    const times = new Float64Array(await Bun.file(join(this.folder, "shared")).arrayBuffer()).subarray(SLOTS);
    return Array.from({ length: count }, (_, i) => ({ sent: times[i] ?? 0, received: times[SAMPLES + i] ?? 0 }));
  }

  /** The CPU time of each server, in µs. */
  cpu(): Promise<number[]> {
    return Promise.all(this.workers.map((worker) => worker.call("cpu")));
  }

  /** What the servers have asked of the AMQP broker. */
  async operations(): Promise<number> {
    const all = await Promise.all(this.workers.map((worker) => worker.call("operations")));
    return all.reduce((sum, operations) => sum + operations, 0);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.workers.map((worker) => worker.close()));
    await rm(this.folder, { recursive: true, force: true });
  }
}

export interface Redis {
  readonly url: string;
  readonly pid: number;
  /** How many commands it has carried out. */
  operations(): Promise<number>;
  close(): Promise<void>;
}

/** A private Redis that keeps nothing on disk; undefined where none is installed. */
export async function startRedis(): Promise<Redis | undefined> {
  const command = Bun.which("redis-server");
  if (!command) return undefined;
  const port = await freePort();
  const options = ["--port", `${port}`, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
  const child = Bun.spawn([command, ...options], { cwd: tmpdir(), stdio: ["ignore", "ignore", "inherit"] });
  process.once("exit", () => child.kill("SIGKILL"));
  const url = `redis://127.0.0.1:${port}`;
  const client = new Bun.RedisClient(url);
  await client.connect();
  return {
    url,
    pid: child.pid,
    async operations() {
      const stats = String(await client.send("INFO", ["commandstats"]));
      const calls = [...stats.matchAll(/cmdstat_(?!info|ping)\S+?:calls=(\d+)/g)];
      return calls.reduce((sum, [, count]) => sum + Number(count), 0);
    },
    async close() {
      client.close();
      child.kill("SIGKILL");
      await child.exited;
    },
  };
}

function freePort(): Promise<number> {
  const server = createServer();
  return new Promise((resolve) =>
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address() as AddressInfo;
      server.close(() => resolve(port));
    }),
  );
}

/** The CPU time of any process on this machine, in µs; NaN where the system does not say. */
export async function cpuOf(pid: number): Promise<number> {
  const stat = await readFile(`/proc/${pid}/stat`, "utf8").catch(() => ""); // Bun.file() reads nothing there
  const [user = NaN, system = NaN] = stat
    .slice(stat.lastIndexOf(")") + 2)
    .split(" ")
    .slice(11, 13)
    .map(Number);
  return (user + system) * 10_000;
}
