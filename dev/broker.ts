/**
 * A RabbitMQ for the tests, the demo and the benchmarks: the one that AMQP_URL names, or else a private one with its own ports, node name
 * and folder, from `rabbitmq-server` on this machine or from Docker. Nothing of a private one outlives this process, however that ends.
 *
 * Two more environment variables are for private ones:
 * - `RABBITMQ_SERVER`: the path of another `rabbitmq-server`, with its `rabbitmqctl` beside it. A script that wraps it must `exec` it.
 * - `RABBITMQ_FEATURE_FLAG`: a feature flag to enable when a node starts for the first time, e.g. `khepri_db` on RabbitMQ 4.0.
 */
import { connect } from "amqplib";
import { existsSync } from "node:fs";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";

export interface Broker {
  /** E.g. `amqp://guest:guest@127.0.0.1:12345`. */
  readonly url: string;
  readonly port: number;
  /** Runs `rabbitmqctl` on this node (half a second) and gives what it printed; throws with its stderr when it fails. */
  ctl(...args: string[]): Promise<string>;
  /** Gives the value of an Erlang expression on this node (a millisecond), by way of JSON. */
  evaluate: Evaluate;
  /** Names, without `amq.*` and the default exchange. */
  exchanges(prefix?: string): Promise<string[]>;
  queues(prefix?: string): Promise<{ name: string; exclusive: boolean; messages: number }[]>;
  /** Of queues and of exchanges, without those of the default exchange; `prefix` is the source's. */
  bindings(prefix?: string): Promise<{ source: string; destination: string; kind: Destination; key: string }[]>;
  /** `rabbitmqctl stop_app`: every connection drops and the port closes, the node's process stays. */
  stop(): Promise<void>;
  /** Undoes `stop()` and `kill()`; resolves when the broker accepts AMQP connections. */
  start(): Promise<void>;
  /** Ends the node's process with SIGKILL. */
  kill(): Promise<void>;
  /** Ends the node and removes its folder. */
  close(): Promise<void>;
}

type Destination = "queue" | "exchange";

export async function startBroker({ name = "rabbit" }: { name?: string } = {}): Promise<Broker> {
  const url = process.env.AMQP_URL;
  if (url) return existingBroker(url);
  const [broker] = await startNodes([name]);
  if (!broker) throw new Error("no broker");
  return broker;
}

/** Private nodes joined into one cluster, also when AMQP_URL is set. */
export function startCluster(nodes: number): Promise<Broker[]> {
  return startNodes(Array.from({ length: nodes }, (_, i) => `rabbit${i + 1}`));
}

async function existingBroker(url: string): Promise<Broker> {
  const { port, protocol, pathname } = new URL(url);
  await (await connect(url)).close();
  const ctl = (...args: string[]) =>
    run(["rabbitmqctl", ...args]).catch((cause: Error) => {
      throw new Error(`this needs a private broker, without AMQP_URL: ${cause.message}`, { cause });
    });
  const evaluate = evaluator();
  return {
    url,
    port: Number(port || (protocol === "amqps:" ? 5671 : 5672)),
    ctl,
    evaluate,
    ...listings(evaluate, decodeURIComponent(pathname.slice(1)) || "/"),
    stop: async () => void (await ctl("stop_app")),
    start: async () => {
      await ctl("start_app");
      await accepting(url, () => false);
    },
    kill: () => Promise.reject(new Error("kill() needs a private broker, without AMQP_URL")),
    close: () => Promise.resolve(),
  };
}

/** Evaluates on a broker of somebody else, through one `rabbitmqctl` that stays: it takes a second to start. It ends with its stdin. */
function evaluator(): Evaluate {
  let lastId = 0;
  const answers = new Map<number, PromiseWithResolvers<string>>();
  const open = () => {
    const loop = `Loop = fun L() -> case io:get_line("") of
        Line when is_binary(Line); is_list(Line) ->
          {ok, Tokens, _} = erl_scan:string(unicode:characters_to_list(base64:decode(string:trim(Line)))),
          {ok, Code} = erl_parse:parse_exprs(Tokens),
          erl_eval:exprs(Code, []),
          L();
        _ -> ok
      end end, Loop().`;
    const child = Bun.spawn(["rabbitmqctl", "eval", loop], { stdin: "pipe", stdout: "pipe", stderr: "pipe" });
    child.unref();
    void Promise.all([readAnswers(child.stdout, answers), child.stderr.text()]).then(([, stderr]) => {
      const message = `this needs rabbitmqctl, or a private broker, without AMQP_URL: ${stderr.trim()}`;
      for (const { reject } of answers.values()) reject(new Error(message));
      answers.clear();
      stdin = undefined;
    });
    return child.stdin;
  };
  let stdin: ReturnType<typeof open> | undefined;
  return async (expression) => {
    stdin ??= open();
    const answer = Promise.withResolvers<string>();
    answers.set(++lastId, answer);
    stdin.write(`${Buffer.from(printing(lastId, expression)).toString("base64")}\n`);
    stdin.flush();
    return parse(await answer.promise);
  };
}

/** Hands out what `printing()` printed to those who wait for it, until the stream ends. */
async function readAnswers(
  stream: ReadableStream<Uint8Array>,
  answers: Map<number, PromiseWithResolvers<string>>,
  print: (text: string) => void = () => {},
): Promise<void> {
  const decoder = new TextDecoder();
  let line = "";
  for await (const bytes of stream) {
    const text = decoder.decode(bytes, { stream: true });
    print(text);
    const lines = (line + text).split("\n");
    line = lines.pop() ?? "";
    for (const [, id, answer = ""] of lines.map((line) => /@(\d+) (\S+)$/.exec(line) ?? [])) {
      answers.get(Number(id))?.resolve(answer);
      answers.delete(Number(id));
    }
  }
}

/** What the private nodes of one cluster share. */
interface Place {
  folder: string;
  /** The path of `rabbitmq-server`, whose `rabbitmqctl` is beside it, or null where Docker runs the node. */
  server: string | null;
  /** The port of Erlang's port mapper, which is their own too. */
  epmd: number;
  cookie: string;
  /** The node that the others join when they boot for the first time. */
  seed: string;
}

/** What a private node tells whoever started it. */
interface Owner {
  /** The node's process has started, or ended where `pid` is undefined. */
  runs(pid?: number): void;
  closed(): Promise<void>;
}

/** A port that was free a moment ago may be taken when the node wants it. */
const ATTEMPTS = 3;

async function startNodes(names: string[]): Promise<Broker[]> {
  const server = process.env.RABBITMQ_SERVER || script("rabbitmq-server");
  if (!server && (names.length > 1 || !Bun.which("docker")))
    throw new Error("no rabbitmq-server here: run sh dev/setup");
  for (let attempt = 1; ; attempt++) {
    try {
      return await tryNodes(names, server);
    } catch (error) {
      if (attempt === ATTEMPTS) throw error;
      console.error(`${error}; once more, with other ports`);
    }
  }
}

async function tryNodes(names: string[], server: string | null): Promise<Broker[]> {
  const folder = await mkdtemp(join(tmpdir(), "socket.io-amqp0-"));
  const place: Place = { folder, server, epmd: freePort(), cookie: crypto.randomUUID(), seed: `${names[0]}@localhost` };
  // The guard reads the process ids of the running nodes, one line each time they change, until this process is gone, and then
  // ends them and clears up. What runs at exit or on a signal would not see a SIGKILL. That the nodes' stdin closes is not enough
  // to end them: the Erlang shell does not notice while it evaluates, and on Erlang 27 it crashes if its stdout is closed too.
  // Guard and nodes ignore SIGTERM, which `bun test` sends to all children as soon as one test takes too long.
  const portMapper = server ? `epmd -port ${place.epmd} -address 127.0.0.1 & ` : "";
  const guard = Bun.spawn(
    [
      "sh",
      "-c",
      `trap "" TERM; ${portMapper}while read -r line; do nodes=$line; done; kill -KILL $! $nodes; wait
        [ ! -d "$0" ] || { sleep 1; rm -rf "$0"; }`,
      folder,
    ],
    { stdin: "pipe", stdout: "ignore", stderr: "ignore", detached: true },
  );
  guard.unref();

  const pids = new Map<string, number>();
  let open = names.length;
  const nodes = names.map((name) =>
    privateNode(name, place, {
      runs(pid) {
        if (pid === undefined) pids.delete(name);
        else pids.set(name, pid);
        guard.stdin.write(`${[...pids.values()].join(" ")}\n`);
        guard.stdin.flush();
      },
      async closed() {
        if (--open > 0) return;
        await rm(folder, { recursive: true, force: true });
        await guard.stdin.end();
        await guard.exited;
      },
    }),
  );
  try {
    await nodes[0]?.start();
    await Promise.all(nodes.slice(1).map((node) => node.start()));
  } catch (error) {
    await Promise.all(nodes.map((node) => node.close()));
    throw error;
  }
  return nodes;
}

/**
 * A node that is driven through the Erlang shell on its stdin, which answers in a millisecond where `rabbitmqctl` takes half a second.
 * With Docker, the end of its stdin ends the node when this process is gone.
 */
function privateNode(name: string, { folder, server, epmd, cookie, seed }: Place, { runs, closed }: Owner): Broker {
  const node = `${name}@localhost`;
  const home = join(folder, name);
  const container = `${basename(folder)}-${name}`;
  const port = freePort();
  const url = `amqp://guest:guest@127.0.0.1:${port}`;
  const env = {
    PATH: process.env.PATH ?? "",
    HOME: home, // holds the cookie
    ERL_CRASH_DUMP: join(home, "erl_crash.dump"),
    ERL_EPMD_PORT: `${epmd}`,
    // A port mapper that Erlang starts itself would stay. Not ERL_FLAGS, which rabbitmqctl overwrites.
    ERL_AFLAGS: "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
    RABBITMQ_NODENAME: node,
    RABBITMQ_NODE_IP_ADDRESS: "127.0.0.1",
    RABBITMQ_NODE_PORT: `${port}`,
    RABBITMQ_DIST_PORT: `${freePort()}`,
    RABBITMQ_CTL_DIST_PORT_MAX: "39999",
    RABBITMQ_ALLOW_INPUT: "true", // the Erlang shell, and the node replaces the script's process
    RABBITMQ_CONF_ENV_FILE: "/dev/null",
    RABBITMQ_CONFIG_FILE: join(home, "rabbitmq.conf"),
    RABBITMQ_ADVANCED_CONFIG_FILE: join(home, "advanced.config"),
    RABBITMQ_ENABLED_PLUGINS_FILE: join(home, "enabled_plugins"),
    RABBITMQ_MNESIA_BASE: home,
    RABBITMQ_LOG_BASE: home,
    RABBITMQ_PID_FILE: join(home, "pid"),
  };
  const docker = ["docker", "run", "--rm", "-i", "--name", container, "-p", `127.0.0.1:${port}:5672`];
  const command = server ? [server] : [...docker, "-e", "RABBITMQ_ALLOW_INPUT=true", "rabbitmq:4"];
  const ctl = server
    ? [join(dirname(server), "rabbitmqctl"), "-n", node]
    : ["docker", "exec", container, "rabbitmqctl"];

  let running: { child: Bun.Subprocess<"pipe", "pipe", "pipe">; ended: Promise<void> } | undefined;
  let closing: Promise<void> | undefined;
  let output = ""; // its end, for errors
  let lastId = 0;
  const answers = new Map<number, PromiseWithResolvers<string>>();

  const evaluate: Evaluate = async (expression) => {
    if (!running) throw new Error(`${node} is not running`);
    const answer = Promise.withResolvers<string>();
    answers.set(++lastId, answer);
    const { stdin } = running.child;
    stdin.write(`${printing(lastId, expression)}\n`);
    stdin.flush();
    return parse(await answer.promise);
  };

  const read = (stream: ReadableStream<Uint8Array>) =>
    readAnswers(stream, answers, (text) => (output = (output + text).slice(-2000)));

  const boot = async () => {
    if (!existsSync(home)) {
      await mkdir(home);
      await writeFile(join(home, ".erlang.cookie"), cookie, { mode: 0o400 });
      await writeFile(env.RABBITMQ_CONFIG_FILE, configuration(node === seed ? [] : [seed, node]));
    }
    const child = Bun.spawn(command, { env, stdin: "pipe", stdout: "pipe", stderr: "pipe", detached: true });
    child.unref();
    if (server) runs(child.pid);
    const ended = Promise.all([child.exited, read(child.stdout), read(child.stderr)]).then(() => {
      running = undefined;
      if (server) runs();
      for (const answer of answers.values()) answer.reject(new Error(`${node} ended`));
      answers.clear();
    });
    running = { child, ended };
  };

  const kill = async () => {
    if (!running) return;
    const { child, ended } = running;
    if (server) child.kill("SIGKILL");
    else await run(["docker", "rm", "-f", container], env);
    await ended;
  };

  return {
    url,
    port,
    ctl: (...args) => run([...ctl, ...args], env),
    evaluate,
    ...listings(evaluate, "/"),
    stop: async () => void (await evaluate("rabbit:stop()")),
    start: async () => {
      const first = !existsSync(home);
      if (running) await evaluate("rabbit:start()");
      else await boot();
      if (!(await accepting(url, () => !running))) throw new Error(`RabbitMQ did not start: ${output}`);
      await evaluate("os:set_signal(sigterm, ignore)");
      // RabbitMQ accepts connections shortly before its boot is over, and a `stop()` in between would end the node.
      while (!(await evaluate("init:get_status() =:= {started, started}"))) await Bun.sleep(10);
      const flag = process.env.RABBITMQ_FEATURE_FLAG;
      if (flag && first) await evaluate(`ok = rabbit_feature_flags:enable(${flag})`);
    },
    kill,
    close: () =>
      (closing ??= kill().then(async () => {
        await rm(home, { recursive: true, force: true });
        await closed();
      })),
  };
}

const configuration = (cluster: string[]) =>
  [
    "log.console = false",
    "disk_free_limit.absolute = 10MB",
    "cluster_formation.peer_discovery_backend = classic_config",
    ...cluster.map((node, i) => `cluster_formation.classic_config.nodes.${i + 1} = ${node}`),
  ].join("\n");

/** Debian's /usr/sbin/rabbitmq-server insists on the user `rabbitmq` and the system's folders; the script behind it does not. */
function script(name: string): string | null {
  const debian = `/usr/lib/rabbitmq/bin/${name}`;
  return existsSync(debian) ? debian : Bun.which(name);
}

/** Below the ports that systems give to outgoing connections: a client could sit on a broker's port while that is stopped. */
function freePort(): number {
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * 22_000);
    try {
      Bun.listen({ hostname: "127.0.0.1", port, socket: { data() {} } }).stop(true);
      return port;
    } catch {
      // taken
    }
  }
}

/** Waits until the broker answers; false if `given up` first. */
async function accepting(url: string, hopeless: () => boolean): Promise<boolean> {
  while (!hopeless()) {
    try {
      await (await connect(url)).close();
      return true;
    } catch {
      await Bun.sleep(50);
    }
  }
  return false;
}

async function run(command: string[], env = process.env): Promise<string> {
  const child = Bun.spawn(command, { env, stdin: "ignore", stdout: "pipe", stderr: "pipe" });
  const [code, stdout, stderr] = await Promise.all([child.exited, child.stdout.text(), child.stderr.text()]);
  if (code !== 0) throw new Error(`${command.join(" ")}: ${stderr.trim() || stdout.trim() || `exit code ${code}`}`);
  return stdout;
}

type Evaluate = <T>(expression: string) => Promise<T>;

/** Erlang code that prints `@<id> <base64>`, which no log line, prompt or terminal encoding can garble. */
const printing = (id: number, expression: string) =>
  `io:format("@${id} ~s~n", [base64:encode(try rabbit_json:encode(#{value => ${expression}})
    catch _:E -> rabbit_json:encode(#{error => list_to_binary(io_lib:format("~0p", [E]))}) end)]).`;

function parse<T>(base64 = ""): T {
  const answer: { value: T } | { error: string } = JSON.parse(Buffer.from(base64, "base64").toString());
  if ("error" in answer) throw new Error(`RabbitMQ: ${answer.error}`);
  return answer.value;
}

function listings(evaluate: Evaluate, vhost: string): Pick<Broker, "exchanges" | "queues" | "bindings"> {
  const v = `<<"${vhost}"/utf8>>`;
  return {
    async exchanges(prefix = "") {
      const names = await evaluate<string[]>(`[N || X <- rabbit_exchange:list(${v}), {_, _, _, N} <- [element(2, X)]]`);
      return names.filter((name) => name !== "" && !name.startsWith("amq.") && name.startsWith(prefix));
    },
    async queues(prefix = "") {
      const rows = await evaluate<[string, boolean, number][]>(
        `[[N, Exclusive, Messages] || [{name, {_, _, _, N}}, {exclusive, Exclusive}, {messages, Messages}] <-
          rabbit_amqqueue:info_all(${v}, [name, exclusive, messages])]`,
      );
      return rows
        .map(([name, exclusive, messages]) => ({ name, exclusive, messages }))
        .filter(({ name }) => name.startsWith(prefix));
    },
    async bindings(prefix = "") {
      const rows = await evaluate<[string, string, Destination, string][]>(
        `[[S, D, Kind, Key] || {binding, {_, _, _, S}, Key, {_, _, Kind, D}, _} <- rabbit_binding:list(${v})]`,
      );
      return rows
        .map(([source, destination, kind, key]) => ({ source, destination, kind, key }))
        .filter(({ source }) => source !== "" && source.startsWith(prefix));
    },
  };
}
