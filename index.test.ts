/** What everyday use needs, and a simulation of what may go wrong. How tests are made: see dev/fixture.ts. */
import { connect, type Options as Amqp } from "amqplib";
import { heapStats } from "bun:jsc";
import { describe, expect, spyOn, test } from "bun:test";
import { once } from "node:events";
import { inspect } from "node:util";
import { Server, type RemoteSocket, type Socket } from "socket.io";
import { Manager } from "socket.io-client";
import * as msgpack from "socket.io-msgpack-parser";
import {
  A_SERVER,
  acquainted,
  adapterOf,
  amqpConnection,
  bindingLate,
  bindings,
  broker,
  child,
  closeConnections,
  closers,
  cluster,
  control,
  crew,
  errors,
  errorsOf,
  eventually,
  exchanges,
  haveRoomExchanges,
  heardFrom,
  host,
  introduce,
  join,
  JSON_TYPE,
  milliseconds,
  nothingIsLeft,
  only,
  prefix,
  publish,
  queues,
  received,
  refuseRoomExchanges,
  reunited,
  scansBindings,
  settled,
  shared,
  start,
  tampered,
  useBroker,
  type Emitting,
  type Host,
  type Member,
  type Pass,
} from "./dev/fixture";
import { Proxy } from "./dev/proxy";
import {
  AmqpAdapter,
  createAdapter,
  createEmitter,
  PeerStream,
  predecessorsOf,
  Publisher,
  readFrame,
  readSections,
  Routes,
  takePackets,
  type AdapterOptions,
  type Emitter,
  type EmitterOptions,
  type Namespace,
} from "./index";

useBroker();

describe("a broadcast to", () => {
  const sharedCrew = shared(crew);
  test.each<[what: string, hearers: string, target: (io: Server, ann: Member, cat: Member) => Emitting]>([
    ["everyone", "ann bob cat", (io) => io],
    ["a room", "ann bob", (io) => io.to("red")],
    ["a room of other servers", "bob cat", (io) => io.to("blue")],
    ["a room that nobody is in", "", (io) => io.to("green")],
    ["two rooms reaches who is in both once", "ann bob cat", (io) => io.to("red").to("blue")],
    ["an array of rooms", "ann bob cat", (io) => io.in(["red", "blue", "green"])],
    ["all but a room", "cat", (io) => io.except("red")],
    ["all but several rooms", "", (io) => io.except(["red", "blue"])],
    ["a room but for another", "cat", (io) => io.to("blue").except("red")],
    ["this server alone", "ann", (io) => io.local],
    ["a room, on this server alone", "ann", (io) => io.local.to(["red", "blue"])],
    ["everyone, volatile", "ann bob cat", (io) => io.volatile],
    ["everyone, uncompressed", "ann bob cat", (io) => io.compress(false)],
    ["a socket by its id", "cat", (io, _, cat) => io.to(cat.socket.id)],
    ["a socket by its id and its room, once", "bob cat", (io, _, cat) => io.to([cat.socket.id, "blue"])],
    ["all but a socket", "ann bob", (io, _, cat) => io.except(cat.socket.id)],
    ["the others in a socket's room", "bob", (_, ann) => ann.socket.to("red")],
    ["a room that the socket is not in", "bob cat", (_, ann) => ann.socket.to("blue")],
    ["all other sockets", "bob cat", (_, ann) => ann.socket.broadcast],
    ["all other sockets but one", "bob", (_, ann, cat) => ann.socket.broadcast.except(cat.socket.id)],
    ["all other sockets of this server alone", "", (_, ann) => ann.socket.local],
  ])("%s", async (_, hearers, target) => {
    const { a, ann, cat, people } = await sharedCrew();
    target(a.io, ann, cat).emit("hello", 1);
    expect(await heardFrom(a.io, people)).toEqual(only(hearers, people, ["hello", 1]));
  });

  test.each<[what: string, args: unknown[]]>([
    ["no argument", []],
    ["text of all planes", ["héllo \u{1F600} \u0000 \u2028"]],
    ["numbers, booleans and nothing", [0, -1.5, 1e21, NaN, true, false, null, undefined]],
    ["objects", [{ a: [{ b: {} }, []], "": undefined, when: new Date(0) }, JSON.parse('{"__proto__":1}')]],
    ["a Buffer", [Buffer.from("hello")]],
    ["a view of a part of a buffer", [new Uint8Array([0, 1, 2, 3]).subarray(1, 3)]],
    ["an ArrayBuffer", [new Uint8Array([1, 2]).buffer]],
    ["empty binary", [Buffer.alloc(0)]],
    ["binary at any depth", [{ a: [1, { b: [Buffer.from("x"), { c: Buffer.from("y") }] }] }, Buffer.from("z")]],
    ["what looks like a placeholder", [{ _placeholder: true, num: 0 }, "451-"]],
    ["a megabyte of text", ["x".repeat(1e6)]],
    ["a megabyte of binary", [Buffer.alloc(1e6, 7)]],
  ])("other servers arrives as on this one: %s", async (_, args) => {
    const { a, people } = await sharedCrew();
    a.io.emit("hello", ...args);
    const { ann, bob, cat } = await heardFrom(a.io, people);
    expect(ann).toHaveLength(1);
    expect(bob).toEqual(ann ?? []);
    expect(cat).toEqual(ann ?? []);
  });

  test("a namespace stays in it", async () => {
    const [a, b, c] = await cluster();
    for (const { io } of [a, b, c]) io.of("/chat");
    await Promise.all([a, b, c].map(({ io }) => adapterOf(io, "/chat").ready));
    const [ann, bob] = await Promise.all([join(b, ["red"], "/chat"), join(c, ["red"])]);
    a.io.of("/chat").to("red").emit("hello");
    a.io.of("/chat").emit("all");
    expect(await heardFrom(a.io.of("/chat"), { ann })).toEqual({ ann: [["hello"], ["all"]] });
    expect(await heardFrom(a.io, { bob })).toEqual({ bob: [] });
  });

  test("sockets with outgoing listeners shows them the packet", async () => {
    const { a, bob, people } = await crew();
    const outgoing: unknown[][] = [];
    bob.socket.onAnyOutgoing((...event: unknown[]) => outgoing.push(event));
    a.io.to("red").emit("hello", { a: Buffer.from("x") });
    await heardFrom(a.io, people);
    expect(outgoing).toEqual([["hello", { a: Buffer.from("x") }], ["end"]]);
  });

  test("sockets whose outgoing listeners throw reaches all of them, whoever sends it", async () => {
    const { a, b, ann, bob } = await crew();
    const people = { bob, dan: await join(b, ["red"]) };
    introduce(people);
    for (const { socket } of Object.values(people))
      socket.onAnyOutgoing(() => {
        throw new Error("a listener's");
      });
    const emitter = createEmitter({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    emitter.to("red").emit("hello", "emitter");
    expect(await heardFrom(emitter, people)).toEqual(only("bob dan", people, ["hello", "emitter"]));
    a.io.to("red").emit("hello", "server");
    expect(await heardFrom(a.io, people)).toEqual(only("bob dan", people, ["hello", "server"]));
    ann.client.off("name?");
    await a.io.in(ann.socket.id).socketsLeave("red");
    expect((await a.io.to("red").timeout(2_000).emitWithAck("name?")).toSorted()).toEqual(["bob", "dan"]);
    const reported = errorsOf(b);
    expect(reported).not.toEqual([]);
    expect(reported.filter((error) => !error.includes("a listener's"))).toEqual([]);
  });

  test("reaches other servers though an outgoing listener throws into it", async () => {
    const { a, ann, bob, cat } = await crew();
    ann.socket.onAnyOutgoing(() => {
      throw new Error("a listener's");
    });
    expect(() => a.io.emit("hello")).toThrow("a listener's");
    a.io.to("blue").emit("end");
    await Promise.all([bob, cat].map(({ client }) => received(client, "end")));
    expect([bob.heard, cat.heard]).toEqual([
      [["hello"], ["end"]],
      [["hello"], ["end"]],
    ]);
  });
});

describe("volatile packets", () => {
  test("of several emits reach a client of another server that takes them, though they come together", async () => {
    const { a, cat } = await crew();
    for (let n = 0; n < 20; n++) a.io.to("blue").volatile.emit("n", n);
    a.io.emit("end");
    await received(cat.client, "end");
    expect(cat.heard.slice(0, -1)).toEqual(Array.from({ length: 20 }, (_, n) => ["n", n]));
  });
});

describe("a room named", () => {
  const names: [what: string, room: string | number][] = [
    ["by a number", 42],
    ["by zero", 0],
    ["in unicode", "Zürich 東京 \u{1F600}"],
    ["#", "#"],
    ["*", "*"],
    ["like a pattern", "a.*.#"],
    ["like a room exchange", "#/#room42"],
    ["like a server's key", "@0123456789abcdef"],
    ["with escapes", "%23 %25 %"],
    ["with control characters", "\u0000\r\n"],
    ["like a socket id", "abcdefghij-ABCDEF_12"],
    ["by 300 characters", "x".repeat(300)],
    ["by 200 characters of two bytes", "é".repeat(200)],
    ["__proto__", "__proto__"],
    ["constructor", "constructor"],
    ["by nothing", ""],
    ["by half an emoji", "\ud83d"],
  ];
  const sharedCrew = shared(crew);
  test.each(names)("%s works across servers", async (_, name) => {
    const room = name as string; // Socket.IO's types know strings only, its users pass numbers too
    const { a, c, cat, people } = await sharedCrew();
    await cat.socket.join(room);
    a.io.to(room).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
    a.io.except(room).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("ann bob", people, ["hello"]));
    expect((await a.io.in(room).fetchSockets()).map(({ id }) => id)).toEqual([cat.socket.id]);
    await cat.socket.leave(room);
    a.io.to(room).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("", people, ["hello"]));
    expect(c.adapter.rooms.has(room)).toBe(false);
  });

  test("by the same but a line end may be left without the other", async () => {
    const { a, cat, people } = await crew();
    await cat.socket.join(["lobby", "lobby\n"]);
    await settled();
    await cat.socket.leave("lobby\n");
    await eventually(async () => expect((await bindings()).some(({ key }) => key === "/#lobby\n")).toBe(false));
    a.io.to("lobby").emit("hello");
    await eventually(() => expect(a.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 })); // in a frame of its own
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
  });

  test("by half an emoji may be left without one that has the same bytes", async () => {
    const { a, cat } = await crew();
    await cat.socket.join(["\ud800", "\ufffd"]);
    await cat.socket.join("last");
    const bound = async () => (await bindings()).some(({ key }) => key === "/#last");
    await eventually(async () => expect(await bound()).toBe(true));
    await Promise.all(["\ud800", "last"].map((room) => cat.socket.leave(room)));
    await eventually(async () => expect(await bound()).toBe(false));
    const hello = received(cat.client, "hello");
    a.io.to("\ufffd").emit("hello");
    await hello;
  });

  test("by more than 255 bytes never meets another", async () => {
    const { a, bob, cat, people } = await crew();
    const long = "é".repeat(300);
    await bob.socket.join(`${long}1`);
    await cat.socket.join(`${long}2`);
    a.io.to(`${long}2`).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
    const names = await exchanges();
    if (haveRoomExchanges) expect(names).toHaveLength(4); // red, blue and the long ones
    for (const name of names) expect(Buffer.byteLength(name)).toBeLessThanOrEqual(255);
  });

  test("like a part of another namespace's name stays in its own", async () => {
    const [a, b, c] = await cluster();
    const [ann, bob] = await Promise.all([join(b, ["b"], "/a"), join(c, [], "/a#b")]);
    const [one, two] = [a.io.of("/a"), a.io.of("/a#b")];
    await Promise.all([adapterOf(a.io, "/a").ready, adapterOf(a.io, "/a#b").ready]);
    one.to("b").emit("hello");
    two.emit("all");
    expect(await heardFrom(one, { ann })).toEqual({ ann: [["hello"]] });
    expect(await heardFrom(two, { bob })).toEqual({ bob: [["all"]] });
  });
});

describe("order", () => {
  test("one server's packets arrive once and as emitted, whatever their rooms and binary", async () => {
    const { a, bob, people } = await crew();
    const ways = (io: Server): Emitting[] => [
      io,
      io.to("red"),
      io.to("blue"),
      io.to(["red", "blue"]),
      io.to(bob.socket.id),
      io.except("green"),
      io.to("blue").compress(false),
    ];
    const numbers = Array.from({ length: 700 }, (_, i) => i);
    for (const i of numbers) {
      ways(a.io)[i % 7]?.emit("n", i, i % 3 ? "plain" : Buffer.from("binary"));
      if (i % 60 === 0) await Bun.sleep(0); // in bursts
    }
    const { bob: all, cat } = await heardFrom(a.io, people);
    expect(all?.map(([, i]) => i)).toEqual(numbers);
    const some = cat?.map(([, i]) => Number(i)) ?? [];
    expect(some).toEqual(some.toSorted((x, y) => x - y));
  });

  test("holds for each of several senders at once", async () => {
    const { nodes, people } = await crew();
    const numbers = Array.from({ length: 200 }, (_, i) => i);
    for (const i of numbers) {
      for (const { io, port } of nodes) (i % 2 ? io : io.to(["red", "blue"])).emit("n", port, i);
      if (i % 20 === 0) await Bun.sleep(0);
    }
    const ends = nodes.flatMap(({ port }) =>
      Object.values(people).map(({ client }) => received(client, `end ${port}`)),
    );
    for (const { io, port } of nodes) io.emit(`end ${port}`);
    await Promise.all(ends);
    for (const { heard } of Object.values(people))
      for (const { port } of nodes)
        expect(heard.filter(([, sender]) => sender === port).map(([, , i]) => i)).toEqual(numbers);
  });

  test("what disconnect handlers of another namespace emit as the server closes arrives", async () => {
    const { a, people } = await crew();
    const chat = a.io.of("/chat");
    chat.on("connection", (socket) => socket.on("disconnect", () => a.io.to("blue").emit("left", "/chat")));
    await join(a, [], "/chat");
    const { bob, cat } = people;
    const left = [bob, cat].map(({ client }) => received(client, "left"));
    await a.io.close();
    await Promise.all(left);
  });

  test("what is emitted just before the server closes still arrives", async () => {
    const { a, cat } = await crew();
    const last = received(cat.client, "last");
    for (let i = 0; i < 100; i++) a.io.to("blue").emit("n", i);
    a.io.emit("last");
    await a.io.close();
    await last;
    expect(cat.heard).toHaveLength(101);
  });
});

describe("a join", () => {
  test("is live: each emit after it reaches the socket, from every server", async () => {
    const { nodes, cat } = await crew();
    for (let i = 0; i < 30; i++) {
      await cat.socket.join(`room${i}`);
      const all = Promise.all(nodes.map((_, n) => received(cat.client, `${i} ${n}`)));
      nodes.forEach(({ io }, n) => io.to(`room${i}`).emit(`${i} ${n}`));
      await all;
    }
  });

  test("is live too when another join of that room is still under way", async () => {
    const { a, c, cat } = await crew();
    const dan = await join(c);
    const [one, two] = [received(cat.client, "hello"), received(dan.client, "hello")];
    void dan.socket.join("green");
    await cat.socket.join("green");
    a.io.to("green").emit("hello");
    await Promise.all([one, two]);
  });

  test("is live after joins and leaves in one breath", async () => {
    const { a, cat, people } = await crew();
    for (let i = 0; i < 20; i++) {
      void cat.socket.join("green");
      void cat.socket.leave("green");
    }
    await cat.socket.join("green");
    a.io.to("green").emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
    void cat.socket.join("green");
    await cat.socket.leave("green");
    a.io.to("green").emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("", people, ["hello"]));
  });

  test("ends though its room is left before it is bound", async () => {
    const { cat } = await crew();
    const rooms = Array.from({ length: 20 }, (_, i) => `room${i}`);
    const joins = rooms.map((room) => cat.socket.join(room));
    for (const room of rooms) void cat.socket.leave(room);
    await Promise.all(joins);
  });

  test("of many rooms at once binds all, and the end of the socket none", async () => {
    const { a, c, cat } = await crew();
    const rooms = Array.from({ length: 200 }, (_, i) => `room${i}`);
    await cat.socket.join(rooms);
    await eventually(() => expect(c.adapter.stats.rooms).toBe(201));
    const all = Promise.all(rooms.map((room) => received(cat.client, room)));
    for (const room of rooms) a.io.to(room).emit(room);
    await all;
    cat.client.disconnect();
    await eventually(() => expect(c.adapter.stats.rooms).toBe(0));
    await eventually(async () =>
      expect(
        (await bindings())
          .filter(({ key, source }) => key.includes("#") && source === `${prefix}#keys`)
          .map(({ key }) => key)
          .toSorted(),
      ).toEqual(haveRoomExchanges ? ["/#blue", "/#red"] : ["/#blue", "/#red", "/#red"]),
    );
  });

  test("hears nothing of what a busy server has emitted before it, though that is far from the broker", async () => {
    const link = await Proxy.open(broker.port);
    const far = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const [a, b, c] = await Promise.all([start({ amqpConnection: far }), start(), start()]);
    let n = 0;
    let isOver = false;
    closers.push(async () => {
      isOver = true;
      link.latency = 0;
      await a.adapter.close();
      link.close();
    });
    await acquainted([a, b, c]);
    const cat = await join(c, ["red"]);
    link.latency = 20; // so that some frames are unconfirmed all the time
    void (async () => {
      for (; !isOver; await Bun.sleep(1)) a.io.to("red").emit("n", ++n);
    })();
    await eventually(() => expect(cat.heard.length).toBeGreaterThan(500));
    for (let i = 0; i < 3; i++) {
      const bob = await join(b);
      const before = n;
      await bob.socket.join("red");
      await received(bob.client, "n");
      expect(bob.heard[0]?.[1]).toBeGreaterThan(before - 200);
      bob.client.disconnect();
      await eventually(() => expect(b.adapter.stats.rooms).toBe(0));
    }
    expect(b.adapter.stats.replayed).toBe(0);
  });

  test("is live while other servers leave the room", async () => {
    const { nodes, a, people } = await crew();
    const members = Object.values(people);
    for (let i = 0; i < 20; i++) {
      await Promise.all(members.map(({ socket }, n) => (n === i % 3 ? socket.join("green") : socket.leave("green"))));
      const hello = members.filter((_, n) => n === i % 3).map(({ client }) => received(client, `hello ${i}`));
      (nodes[(i + 1) % 3] ?? a).io.to("green").emit(`hello ${i}`);
      await Promise.all(hello);
    }
  });
});

describe("acknowledgements", () => {
  const sharedCrew = shared(crew);
  test.each<[what: string, names: string, target: (io: Server) => Pick<Server, "timeout">]>([
    ["everyone", "ann bob cat", (io) => io],
    ["a room of other servers", "bob cat", (io) => io.to("blue")],
    ["several rooms, once each", "ann bob cat", (io) => io.to(["red", "blue"])],
    ["all but a room", "cat", (io) => io.except("red")],
    ["this server alone", "ann", (io) => io.local],
    ["nobody", "", (io) => io.to("green")],
  ])("come from %s as soon as all are there", async (_, expected, target) => {
    const { a } = await sharedCrew();
    const names: unknown[] = await target(a.io).timeout(2_000).emitWithAck("name?");
    expect(names.toSorted().join(" ")).toBe(expected);
  });

  test("carry binary both ways", async () => {
    const { a, people } = await crew();
    for (const { client } of Object.values(people))
      client.on("echo", (data: unknown, answer: (value: unknown) => void) => answer({ data }));
    const echo = { data: { deep: [Buffer.from("hello")] } };
    expect(await a.io.timeout(2_000).emitWithAck("echo", echo.data)).toEqual([echo, echo, echo]);
  });

  test("that are missing are an error, with those that came", async () => {
    const { a, cat } = await crew();
    cat.client.off("name?");
    const { promise, resolve } = Promise.withResolvers<unknown[]>();
    a.io.timeout(300).emit("name?", (...result: [Error | null, string[]]) => resolve(result));
    const [error, names] = (await promise) as [Error, string[]];
    expect(error).toBeInstanceOf(Error);
    expect(names.toSorted()).toEqual(["ann", "bob"]);
  });

  test("may take the longest time that a timer takes", async () => {
    const { a } = await crew();
    expect(await a.io.timeout(2 ** 31 - 1).emitWithAck("name?")).toHaveLength(3);
  });

  test("and other answers are not waited for from a server where the namespace has just closed", async () => {
    const [a, b] = await cluster(undefined, { cleanupEmptyChildNamespaces: true });
    for (const { io } of [a, b]) io.of(/^\/dynamic-/);
    const [ann, bob] = await Promise.all([join(a, [], "/dynamic-1"), join(b, [], "/dynamic-1")]);
    const { adapter } = a.io.of("/dynamic-1");
    await eventually(async () => expect(await adapter.serverCount()).toBe(2));
    const gone = once(bob.socket, "disconnect");
    bob.client.disconnect();
    await gone;
    expect(await milliseconds(() => a.io.of("/dynamic-1").fetchSockets())).toBeLessThan(1_000);
    expect(ann.socket.connected).toBe(true);
  });

  test("for arguments that cannot be encoded are an error for the caller, and cost no other", async () => {
    const { a, people } = await crew();
    await expect(a.io.timeout(500).emitWithAck("name?", 1n)).rejects.toThrow("BigInt");
    expect(await a.io.timeout(2_000).emitWithAck("name?")).toHaveLength(3);
    const nobody = { ann: [], bob: [], cat: [] };
    expect(await heardFrom(a.io, people)).toEqual(nobody);
    expect(errorsOf(a)).toEqual([expect.stringContaining("A packet cannot be encoded for other servers")]);
  });

  test("come from one remote socket", async () => {
    const { a, cat } = await crew();
    const [remote] = await a.io.in(cat.socket.id).fetchSockets();
    expect(await remote?.timeout(2_000).emitWithAck("name?")).toBe("cat");
  });
});

describe("sockets of other servers", () => {
  const byId = (sockets: { id: string }[]) => new Set(sockets.map(({ id }) => id));

  test("are fetched with their data, rooms and handshake", async () => {
    const { a, cat } = await crew();
    cat.socket.data = { name: "Cat", age: 7, tags: ["x"], face: Buffer.from("=^.^=") };
    const sockets = await a.io.fetchSockets();
    expect(sockets).toHaveLength(3);
    const remote = sockets.find(({ id }) => id === cat.socket.id);
    expect(remote?.data).toEqual(cat.socket.data);
    expect(remote?.rooms).toEqual(cat.socket.rooms);
    const { address, auth, headers, query, url, xdomain, time } = cat.socket.handshake;
    expect(remote?.handshake).toMatchObject({ address, auth, headers, query: { ...query }, url, xdomain, time });
    expect(remote?.handshake.auth).toEqual({ token: "secret" });
  });

  test("are fetched when the last one here goes, and the namespace with it", async () => {
    const [a, b] = await cluster(undefined, { cleanupEmptyChildNamespaces: true });
    for (const { io } of [a, b]) io.of(/^\/doc-/);
    const [ann, bob] = [await join(a, [], "/doc-1"), await join(b, [], "/doc-1")];
    await eventually(async () => expect(await adapterOf(a.io, "/doc-1").serverCount()).toBe(2));
    const asked = Promise.withResolvers<string[]>();
    ann.socket.on("disconnecting", () => {
      const sockets = a.io.of("/doc-1").fetchSockets();
      asked.resolve(sockets.then((sockets) => sockets.map(({ id }) => id)));
    });
    ann.client.disconnect();
    expect(await asked.promise).toContain(bob.socket.id);
    await eventually(() => expect(a.io._nsps.has("/doc-1")).toBe(false));
  });

  test("are counted on all servers by allSockets() too", async () => {
    const { a, ann, bob, cat } = await crew();
    const ids = (...members: Member[]) => new Set(members.map(({ socket }) => socket.id));
    expect(await a.io.allSockets()).toEqual(ids(ann, bob, cat));
    expect(await a.io.in("blue").allSockets()).toEqual(ids(bob, cat));
  });

  test("are fetched in as many answers as maxPayload takes, without the data that is too much for it", async () => {
    const { b, people, a } = await crew({ maxPayload: 20_000 });
    const crowd = await Promise.all(Array.from({ length: 20 }, () => join(b, ["green"])));
    for (const { socket } of crowd) socket.data = { text: "x".repeat(3_000) };
    people.bob.socket.data = { text: "x".repeat(30_000) };
    const sockets = await a.io.in("green").fetchSockets();
    expect(sockets.map(({ data }) => data)).toEqual(crowd.map(({ socket }) => socket.data));
    expect((await a.io.in("blue").fetchSockets()).map(({ data }) => data)).toEqual([{}, {}]);
    expect(errorsOf(b)).toEqual([expect.stringContaining("data.text cannot be sent to another server")]);
  });

  test("are fetched by room, without a room, and not with local", async () => {
    const { a, ann, bob, cat } = await crew();
    expect(byId(await a.io.in("blue").fetchSockets())).toEqual(byId([bob.socket, cat.socket]));
    expect(byId(await a.io.in(["red", "blue"]).except("blue").fetchSockets())).toEqual(byId([ann.socket]));
    expect(byId(await a.io.local.fetchSockets())).toEqual(byId([ann.socket]));
    expect(await a.io.in("green").fetchSockets()).toEqual([]);
  });

  test("join and leave rooms, in order with a fetch", async () => {
    const { a, bob, cat, people } = await crew();
    a.io.in("blue").socketsJoin(["green", "yellow"]);
    expect(byId(await a.io.in("green").fetchSockets())).toEqual(byId([bob.socket, cat.socket]));
    a.io.in("red").socketsLeave("green");
    expect(byId(await a.io.in("green").fetchSockets())).toEqual(byId([cat.socket]));
    await cat.socket.join("green"); // resolves when the room is bound
    a.io.to("green").emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
  });

  test("hear what is emitted right after they were made to join, also to rooms that were named together before", async () => {
    const [a, b] = await Promise.all([start(), start({ amqpConnection: bindingLate("/#green") })]);
    await acquainted([a, b]);
    const bob = await join(b, ["blue"]);
    await settled();
    a.io.to(["green", "red"]).emit("before");
    a.io.in("blue").socketsJoin("green");
    a.io.to(["green", "red"]).emit("after");
    expect(await heardFrom(a.io, { bob })).toEqual({ bob: [["after"]] });
  });

  test("join, leave, hear and disconnect one by one", async () => {
    const { a, cat, people } = await crew();
    const remote = async (): Promise<RemoteSocket<Record<string, never>, unknown> | undefined> =>
      (await a.io.in(cat.socket.id).fetchSockets())[0];
    (await remote())?.join("green");
    (await remote())?.leave("blue");
    expect([...((await remote())?.rooms ?? [])].toSorted()).toEqual([cat.socket.id, "green"].toSorted());
    a.io.to(cat.socket.id).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
    const gone = received(cat.client, "disconnect");
    (await remote())?.disconnect(true);
    expect(await gone).toContain("io server disconnect");
  });

  test("disconnect by room, after the packet that was sent just before", async () => {
    const { a, ann, bob, cat } = await crew();
    const gone = [bob, cat].map(({ client }) => received(client, "disconnect"));
    a.io.to("blue").emit("bye");
    a.io.in("blue").disconnectSockets();
    await Promise.all(gone);
    expect([bob.heard, cat.heard]).toEqual([[["bye"]], [["bye"]]]);
    expect(ann.client.connected).toBe(true);
    expect(byId(await a.io.fetchSockets())).toEqual(byId([ann.socket]));
  });

  test("disconnect with their connections when asked to", async () => {
    const { a, cat } = await crew();
    const closed = new Promise((resolve) => cat.client.io.on("close", resolve));
    a.io.in(cat.socket.id).disconnectSockets(true);
    await closed;
  });
});

describe("servers", () => {
  test("emit to each other, not to themselves, per namespace", async () => {
    const nodes = await cluster();
    const [a, b, c] = nodes;
    for (const { io } of nodes) io.of("/chat");
    await Promise.all(nodes.map(({ io }) => adapterOf(io, "/chat").ready));
    const logs = nodes.map(({ io }) => {
      const log: unknown[][] = [];
      io.on("hello", (...args: unknown[]) => log.push(["/", ...args]));
      io.of("/chat").on("hello", (...args: unknown[]) => log.push(["/chat", ...args]));
      return log;
    });
    const ended = Promise.all([b, c].map(({ io }) => once(io.of("/chat"), "end")));
    const args = [{ a: 1 }, [Buffer.from("x")], null];
    a.io.serverSideEmit("hello", ...args);
    a.io.of("/chat").serverSideEmit("hello");
    a.io.of("/chat").serverSideEmit("end");
    await ended;
    expect(logs).toEqual([[], ...Array(2).fill([["/", ...args], ["/chat"]])]);
  });

  test("answer each other", async () => {
    const [a, b, c] = await cluster();
    a.io.on("sum", () => expect.unreachable());
    b.io.on("sum", (x: number, y: number, answer: (sum: unknown) => void) => answer(x + y));
    c.io.on("sum", (x: number, y: number, answer: (sum: unknown) => void) => {
      answer({ sum: x + y });
      answer("once only");
    });
    const answers: unknown[] = await a.io.serverSideEmitWithAck("sum", 1, 2);
    expect(answers).toHaveLength(2);
    expect(answers).toContainEqual(3);
    expect(answers).toContainEqual({ sum: 3 });
  });

  test("with a listener that throws lose nothing else, and say so", async () => {
    const [a, b] = await cluster();
    const taken: number[] = [];
    b.io.on("n", (n: number) => {
      if (n === 3) throw new Error("a listener's");
      taken.push(n);
    });
    const last = once(b.io, "last");
    for (const n of [1, 2, 3, 4, 5]) a.io.serverSideEmit("n", n);
    a.io.serverSideEmit("last");
    await last;
    expect(taken).toEqual([1, 2, 4, 5]);
    expect(errorsOf(b)).toEqual([expect.stringContaining("a listener's")]);
  });

  test("that do not answer in time are an error, with the answers that came", async () => {
    const [a, b] = await cluster({ requestsTimeout: 200 });
    b.io.on("name?", (answer: (name: string) => void) => answer("b"));
    const { promise, resolve } = Promise.withResolvers<unknown[]>();
    a.io.serverSideEmit("name?", (...result: unknown[]) => resolve(result));
    expect(await promise).toEqual([expect.any(Error), ["b"]]);
  });

  test("alone get no answers, at once", async () => {
    const a = await start();
    await a.adapter.ready;
    expect(await a.io.serverSideEmitWithAck("name?")).toEqual([]);
    expect(await a.io.fetchSockets()).toEqual([]);
    expect(await a.adapter.serverCount()).toBe(1);
  });

  test("that close are forgotten at once", async () => {
    const { a, b, c } = await crew();
    await c.io.close();
    expect(await milliseconds(() => b.io.fetchSockets())).toBeLessThan(500);
    await acquainted([a, b]);
    expect(await a.io.timeout(2_000).emitWithAck("name?")).toHaveLength(2);
  });

  test("that close several namespaces say nothing behind their goodbye", async () => {
    const a = await start();
    const chat = adapterOf(a.io.of("/chat") && a.io, "/chat");
    const emitter = createEmitter({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    for (let i = 0; i < 4; i++) {
      const b = await start();
      b.io.of("/chat");
      await eventually(async () => expect(await chat.serverCount()).toBe(2));
      await Bun.sleep(50); // announcements are made at least 20 ms apart
      await b.io.close();
      const said = once(a.io, "said");
      emitter.serverSideEmit("said");
      await said;
      expect(await chat.serverCount()).toBe(1);
    }
  });

  test("killed with SIGKILL are not waited for once the broker has dropped their queue", async () => {
    const nodes = await cluster();
    const victim = child(A_SERVER);
    await acquainted(nodes, 4);
    victim.kill("SIGKILL");
    await victim.exited;
    for (const { io, adapter } of nodes) {
      expect(await milliseconds(() => io.fetchSockets())).toBeLessThan(500);
      expect(await adapter.serverCount()).toBe(3);
    }
  }, 15_000);

  test("with other heartbeats know each other all the time", async () => {
    const [a, b] = await Promise.all([start({ heartbeatInterval: 50, heartbeatTimeout: 400 }), start()]);
    await acquainted([a, b]);
    for (const end = performance.now() + 1_500; performance.now() < end; await Bun.sleep(20))
      expect(await a.adapter.serverCount()).toBe(2);
  });

  test("killed with SIGKILL are not counted once they miss a heartbeat, though nobody asks them", async () => {
    const a = await start({ heartbeatInterval: 200, heartbeatTimeout: 60_000 });
    const victim = child(A_SERVER.replace("prefix }", "prefix, heartbeatInterval: 200 }"));
    await acquainted([a], 2);
    victim.kill("SIGKILL");
    await eventually(async () => expect(await a.adapter.serverCount()).toBe(1), 3_000);
  });

  test("that hang are an error in time, and no longer waited for when they die", async () => {
    const { nodes, a } = await crew({ requestsTimeout: 5_000 });
    for (const { io } of nodes) io.on("name?", (answer: (name: string) => void) => answer("server"));
    const victim = child(A_SERVER);
    await acquainted(nodes, 4);
    victim.kill("SIGSTOP");
    await expect(a.io.timeout(100).fetchSockets()).rejects.toThrow();
    const waiting = Promise.all([
      a.io.fetchSockets(),
      a.io.serverSideEmitWithAck("name?"),
      a.io.timeout(5_000).emitWithAck("name?"),
    ]);
    victim.kill("SIGKILL");
    await victim.exited;
    expect(
      await milliseconds(async () => {
        const [sockets, servers, clients] = await waiting;
        expect([sockets.length, servers.length, clients.length]).toEqual([3, 2, 3]);
      }),
    ).toBeLessThan(500);
  }, 15_000);

  test("that share one createAdapter() result, given to the constructor, are servers of their own", async () => {
    const adapter = createAdapter({ amqpConnection, prefix });
    const hosts = await Promise.all([host({ adapter }), host({ adapter }), host({ adapter })]);
    const nodes = hosts.map(({ io, port }) => ({ io, port, adapter: adapterOf(io) }));
    await acquainted(nodes);
    const members = await Promise.all(nodes.map((node) => join(node, ["red"])));
    const all = Promise.all(members.map(({ client }) => received(client, "hello")));
    nodes[0]?.io.to("red").emit("hello");
    await all;
    expect(await queues()).toHaveLength(3);
    await nodes[2]?.io.close();
    await acquainted(nodes.slice(0, 2));
  });

  test("with different prefixes do not meet", async () => {
    const { a, people } = await crew();
    const other = await start({ prefix: `${prefix}x` });
    await other.adapter.ready;
    const dan = await join(other, ["red"]);
    a.io.to("red").emit("hello");
    other.io.to("red").emit("other");
    expect(await heardFrom(other.io, { dan })).toEqual({ dan: [["other"]] });
    expect(await heardFrom(a.io, people)).toEqual(only("ann bob", people, ["hello"]));
    expect(await other.io.fetchSockets()).toHaveLength(1);
    expect(await other.adapter.serverCount()).toBe(1);
  });

  test("with and without room exchanges work together", async () => {
    const [a, b, c] = await Promise.all([start(), start({ roomExchanges: false }), start({ roomExchanges: false })]);
    await acquainted([a, b, c]);
    const people = { ann: await join(a, ["red"]), bob: await join(b, ["red"]), cat: await join(c, ["blue"]) };
    for (const { io } of [a, b, c]) {
      io.to("red").emit("hello");
      io.to(["red", "blue"]).emit("all");
      const both = [["hello"], ["all"]];
      expect(await heardFrom(io, people)).toEqual({ ann: both, bob: both, cat: [["all"]] });
    }
    await people.ann.socket.leave("red");
    b.io.to("red").emit("hello");
    expect(await heardFrom(b.io, people)).toEqual(only("bob", people, ["hello"]));
  });

  test("miss nothing that others tell each other, though their queue gets everything", async () => {
    const [link, b] = [await Proxy.open(broker.port), await start()];
    const answers: Pass = ({ key, send, sendUnconfirmed }) =>
      key === `@${b.adapter.uid}` ? sendUnconfirmed() : send();
    const a = await start({ amqpConnection: tampered(answers), requestsTimeout: 500 });
    await acquainted([a, b]);
    const c = await start({ amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`) });
    closers.push(async () => {
      link.latency = 0;
      await Promise.all([a, c].map(({ adapter }) => adapter.close()));
      link.close();
      [a, c].forEach(errorsOf);
    });
    await c.adapter.ready;
    link.latency = 50; // its rooms are bound after seconds, and it gets everything until then
    const { client } = await join(
      c,
      Array.from({ length: 40 }, (_, i) => `room${i}`),
    );
    await acquainted([a, b, c]);
    for (let i = 0; i < 3; i++) {
      await b.io.fetchSockets();
      const hello = received(client, "hello");
      a.io.emit("hello");
      await hello;
    }
    expect(c.adapter.stats.rooms).toBeLessThan(40);
    expect(c.adapter.stats.replayed).toBe(0);
  });
});

describe("namespaces", () => {
  test("that match a pattern come with a client, go with it, and come again", async () => {
    const nodes = await cluster(undefined, { cleanupEmptyChildNamespaces: true });
    const [a, b, c] = nodes;
    for (const { io } of nodes) io.of(/^\/dynamic-\d+$/).on("connection", (socket) => socket.join("red"));
    for (let round = 0; round < 3; round++) {
      const [ann, bob] = await Promise.all([join(a, ["red"], "/dynamic-1"), join(b, ["red"], "/dynamic-1")]);
      await Promise.all([adapterOf(a.io, "/dynamic-1").ready, adapterOf(b.io, "/dynamic-1").ready]);
      const hello = received(bob.client, "hello");
      a.io.of("/dynamic-1").to("red").emit("hello");
      await hello;
      expect(await a.io.of("/dynamic-1").fetchSockets()).toHaveLength(2);
      ann.client.disconnect();
      bob.client.disconnect();
      await eventually(async () => expect(JSON.stringify(await bindings())).not.toContain("dynamic"));
    }
    expect(await c.io.fetchSockets()).toEqual([]);
  });

  test("that only some servers have are not waited for by the others", async () => {
    const [a, b] = await cluster();
    const { client } = await join(b, [], "/late");
    client.on("name?", (answer: (name: string) => void) => answer("late"));
    await adapterOf(b.io, "/late").ready;
    const late = a.io.of("/late");
    await adapterOf(a.io, "/late").ready;
    await eventually(async () => expect(await late.fetchSockets()).toHaveLength(1));
    expect(await milliseconds(() => late.fetchSockets())).toBeLessThan(500);
    expect(await late.timeout(2_000).emitWithAck("name?")).toEqual(["late"]);
  });

  test("that close and open again at once are as new", async () => {
    const [a, b] = await cluster(undefined, { cleanupEmptyChildNamespaces: true });
    for (const { io } of [a, b]) io.of(/^\/dynamic-/).on("connection", (socket) => socket.emit("welcome"));
    for (let round = 0; round < 10; round++) {
      const [ann, bob] = await Promise.all([join(a, ["red"], "/dynamic-1"), join(b, ["red"], "/dynamic-1")]);
      await Promise.all([a, b].map(({ io }) => adapterOf(io, "/dynamic-1").ready));
      const hello = Promise.all([ann, bob].flatMap(({ client }) => [received(client, "a"), received(client, "b")]));
      a.io.of("/dynamic-1").to("red").emit("a");
      b.io.of("/dynamic-1").emit("b");
      await hello;
      const gone = [ann, bob].map(({ socket }) => once(socket, "disconnect"));
      ann.client.disconnect();
      bob.client.disconnect();
      await Promise.all(gone);
    }
  });

  test("stay open under a client that is on its way, though another one goes", async () => {
    const link = await Proxy.open(broker.port);
    const node = await start(
      { amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`) },
      { cleanupEmptyChildNamespaces: true },
    );
    closers.push(async () => {
      await node.adapter.close();
      link.close();
    });
    node.io.of(/^\/dynamic-/);
    await node.adapter.ready;
    await settled(); // until then the queue gets everything, and no client is held back
    link.latency = 100; // clients are held back until their namespace is bound
    const [ann, bob] = [0, 1].map(() => {
      const manager = new Manager(`http://127.0.0.1:${node.port}`, { transports: ["websocket"], reconnection: false });
      closers.unshift(() => manager._close());
      return manager.socket("/dynamic-1");
    });
    if (!ann || !bob) throw new Error("two clients");
    const connected = received(bob, "connect");
    const coming = () => node.io._nsps.get("/dynamic-1") as { _preConnectSockets?: Map<string, Socket> } | undefined;
    await eventually(() => expect(coming()?._preConnectSockets?.size).toBe(2));
    ann.io.engine.close();
    await connected;
    expect(node.io.of("/dynamic-1").sockets.has(bob.id ?? "")).toBe(true);
  });

  test("close in time over a link that is dead, though nobody has noticed", async () => {
    const link = await Proxy.open(broker.port);
    const amqpConnection = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const node = await start({ amqpConnection, requestsTimeout: 200 });
    node.io.of("/chat");
    await Promise.all([node.adapter.ready, adapterOf(node.io, "/chat").ready]);
    link.silence();
    expect(await milliseconds(() => node.io.close())).toBeLessThan(4_000);
    link.close();
    errorsOf(node);
  });

  test("close together, with what is being bound and unbound", async () => {
    for (let round = 0; round < 8; round++) {
      const nodes = await cluster();
      for (const { io } of nodes) io.of("/chat");
      await Promise.all(nodes.map(({ io }) => adapterOf(io, "/chat").ready));
      const [ann] = await Promise.all([join(nodes[2], ["red"]), join(nodes[1], ["red"], "/chat")]);
      void ann.socket.join("green");
      await Promise.all(nodes.map(({ io }) => io.close()));
      expect([await exchanges(), await queues()]).toEqual([[], []]);
    }
  });

  test("that close have given their answers before, though these had to wait", async () => {
    let isSlow = false;
    const link = await Proxy.open(broker.port);
    const amqpConnection = tampered(({ send, sendUnconfirmed }) => (isSlow ? sendUnconfirmed() : send()), link.port);
    const server = { cleanupEmptyChildNamespaces: true };
    const [a, b] = await Promise.all([start({}, server), start({ amqpConnection }, server)]);
    await acquainted([a, b]);
    for (const { io } of [a, b]) io.of(/^\/dynamic-/);
    const [ann, bob] = await Promise.all([join(a, [], "/dynamic-1"), join(b, [], "/dynamic-1")]);
    await eventually(async () => expect(await a.io.of("/dynamic-1").adapter.serverCount()).toBe(2));
    introduce({ ann });
    bob.client.on("name?", (answer: (name: string) => void) => {
      answer("bob");
      bob.client.disconnect();
    });
    isSlow = true;
    for (let unconfirmed = 1; unconfirmed <= 8; unconfirmed++) {
      b.io.to("red").emit("hello");
      await eventually(() => expect(b.adapter.stats.unconfirmed).toBe(unconfirmed));
    }
    const names: unknown[] = await a.io.of("/dynamic-1").timeout(2_000).emitWithAck("name?");
    expect(names.toSorted()).toEqual(["ann", "bob"]);
    isSlow = false;
    link.cut(); // what is unconfirmed goes again
    link.heal();
    await b.adapter.close();
    link.close();
    errorsOf(b);
  });
});

describe("rooms and sockets of an adapter", () => {
  /** What a program of joins and leaves does to `rooms`, `sids` and the room events; socket ids by their names. */
  async function life(node: Host): Promise<unknown[]> {
    const { adapter } = node.io.of("/");
    const log: unknown[] = [];
    for (const event of ["create-room", "join-room", "leave-room", "delete-room"])
      adapter.on(event, (...args: unknown[]) => log.push([event, ...args]));
    const [one, two] = [await join(node), await join(node)];
    const steps: (() => unknown)[] = [
      () => one.socket.join("a"),
      () => one.socket.join("a"),
      () => two.socket.join(["a", "b"]),
      () => one.socket.leave("a"),
      () => one.socket.leave("a"),
      () => one.socket.leave("none"),
      () => node.io.in("b").socketsJoin(["c", "d"]),
      () => node.io.in("c").socketsLeave("b"),
      () => adapter.addAll(one.socket.id, new Set(["e"])),
      () => adapter.del("stranger", "e"),
      () => adapter.delAll(one.socket.id),
      () => log.push(adapter.socketRooms(two.socket.id), adapter.socketRooms("stranger")),
      () => node.io.in("d").disconnectSockets(),
    ];
    for (const step of steps) {
      void step();
      log.push({
        rooms: [...adapter.rooms].map(([room, ids]) => [room, [...ids]]),
        sids: [...adapter.sids].map(([id, rooms]) => [id, [...rooms]]),
      });
    }
    const names = new Map([one, two].map(({ socket }, n) => [socket.id, `socket ${n}`]));
    const named = (value: unknown): unknown => {
      if (typeof value === "string") return names.get(value) ?? value;
      if (value instanceof Set || Array.isArray(value)) return [...value].map(named);
      return typeof value === "object" && value
        ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, named(v)]))
        : value;
    };
    return log.map(named);
  }

  test("are those of the in-memory adapter, at every step", async () => {
    const [a, b] = await cluster();
    await join(b, ["a", "b", "c"]); // another server's sockets are no part of it
    expect(await life(a)).toEqual(await life(await host()));
  });
});

describe("clients over", () => {
  test.each([
    ["WebSocket, the HTTP engine", "http", ["websocket"]],
    ["long-polling, the HTTP engine", "http", ["polling"]],
    ["long-polling upgraded to WebSocket, the HTTP engine", "http", ["polling", "websocket"]],
    ["WebSocket, Bun's engine", "bun", ["websocket"]],
    ["long-polling, Bun's engine", "bun", ["polling"]],
  ] as const)("%s, get text and binary in order and answer", async (_, engine, transports) => {
    const { a, people } = await crew(undefined, { engine }, { transports: [...transports] });
    const packets = [
      ["text", "héllo"],
      ["binary", { deep: [Buffer.from("x")] }],
      ["text", 1],
      ["many", "x".repeat(1e5)],
    ];
    for (const [event = "", ...args] of packets) a.io.to(["red", "blue"]).emit(String(event), ...args);
    expect(await heardFrom(a.io, people)).toEqual({ ann: packets, bob: packets, cat: packets });
    expect(await a.io.timeout(2_000).emitWithAck("name?")).toHaveLength(3);
    const gone = received(people.cat.client, "disconnect");
    a.io.in(people.cat.socket.id).disconnectSockets(true);
    await gone;
  });

  test("a custom parser get text and binary, and answer", async () => {
    const { a, bob, people } = await crew(undefined, { parser: msgpack }, { parser: msgpack });
    const outgoing: unknown[][] = [];
    bob.socket.onAnyOutgoing((...event: unknown[]) => outgoing.push(event));
    const packet = ["hello", { n: 1, deep: [Buffer.from("x")] }, null];
    a.io.to(["red", "blue"]).emit("hello", ...packet.slice(1));
    expect(await heardFrom(a.io, people)).toEqual({ ann: [packet], bob: [packet], cat: [packet] });
    expect(outgoing[0]).toEqual(packet);
    const emitter = createEmitter({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    emitter.to("blue").emit("hello", ...packet.slice(1));
    expect(await heardFrom(emitter, people)).toEqual(only("bob cat", people, packet));
    expect(await a.io.timeout(2_000).emitWithAck("name?")).toHaveLength(3);
  });

  test("a parser that makes nothing of an event get the others", async () => {
    class Encoder {
      readonly #encoder = new msgpack.Encoder();
      encode(packet: Parameters<msgpack.Encoder["encode"]>[0]): unknown {
        return packet.data?.[0] === "nothing" ? [] : this.#encoder.encode(packet);
      }
    }
    const parser = { ...msgpack, Encoder } as unknown as typeof msgpack;
    const { a, people } = await crew(undefined, { parser }, { parser });
    for (const name of ["hello", "nothing", "bye"]) a.io.emit(name);
    const heard = [["hello"], ["bye"]];
    expect(await heardFrom(a.io, people)).toEqual({ ann: heard, bob: heard, cat: heard });
  });

  test("a parser that keeps dates and NaN keep them in acknowledged broadcasts and their answers", async () => {
    const { a, people } = await crew(undefined, { parser: msgpack }, { parser: msgpack });
    const values = [new Date(0), NaN];
    for (const { client } of Object.values(people))
      client.on("echo", (...args: [...unknown[], (answer: unknown) => void]) => {
        const answer = args.pop() as (answer: unknown) => void;
        answer(args);
      });
    expect(await a.io.timeout(2_000).emitWithAck("echo", ...values)).toEqual([values, values, values]);
    for (const { heard } of Object.values(people)) expect(heard).toEqual([["echo", ...values]]);
  });

  test("a parser whose answer cannot be sent to another server report it there, and give an error", async () => {
    class Decoder extends msgpack.Decoder {
      override add(packet: unknown): void {
        this.once("decoded", ({ data }: { data: unknown }) => {
          if (Array.isArray(data)) data.forEach((value, i) => value === "a BigInt" && (data[i] = 1n));
        });
        super.add(packet);
      }
    }
    const parser = { ...msgpack, Decoder };
    const { a, b, bob, people } = await crew(undefined, { parser }, { parser: msgpack });
    for (const { client } of Object.values(people))
      client.on("ask", (answer: (value: unknown) => void) => answer(client === bob.client ? "a BigInt" : "text"));
    const answers: unknown[] = await a.io.timeout(2_000).emitWithAck("ask");
    expect(answers.map(String).toSorted()).toEqual([expect.stringMatching("cannot be sent"), "text", "text"]);
    expect(errorsOf(b)).toEqual([expect.stringContaining("A packet cannot be encoded for other servers")]);
  });
});

describe("on the broker", () => {
  test("the names are those of dev/protocol.md", async () => {
    const nodes = await cluster({ prefix: undefined });
    const [a, b, c] = nodes;
    const ours = async () => {
      const all = await broker.bindings("socket.io");
      return all.map(({ source, key, kind, destination }) => `${source} --${key}--> ${kind} ${destination}`).toSorted();
    };
    a.io.of("/chat");
    await adapterOf(a.io, "/chat").ready;
    expect((await broker.exchanges("socket.io")).toSorted()).toEqual(["socket.io", "socket.io#keys"]);
    const names = await broker.queues("socket.io#");
    expect(names).toHaveLength(3);
    for (const { name, exclusive } of names)
      expect([name, exclusive]).toEqual([expect.stringMatching(/^socket\.io#@[\w-]+\.\d+$/), true]);

    const keys = names.flatMap(({ name }) => ["/", "@", `@${/@([\w-]+)/.exec(name)?.[1]}`].map((key) => [key, name]));
    const servers = keys.map(([key, queue]) => `socket.io#keys --${key}--> queue ${queue}`);
    await eventually(async () => {
      const [chat, ...others] = (await ours()).toSorted(
        (one, other) => Number(/chat/.test(other)) - Number(/chat/.test(one)),
      );
      expect(chat).toMatch(/^socket\.io#keys --\/chat--> queue socket\.io#@/);
      expect(others).toEqual(["socket.io ----> exchange socket.io#keys", ...servers.toSorted()]);
    });
    const before = await ours();
    const [ann, bob] = await Promise.all([join(b), join(c)]);
    expect(await ours()).toEqual(before); // a connecting client adds nothing

    await ann.socket.join("room42");
    const added = (await ours()).filter((binding) => !before.includes(binding));
    expect(added).toEqual(
      haveRoomExchanges
        ? [
            expect.stringMatching(/^socket\.io#\/#room42 ----> queue socket\.io#@/),
            "socket.io#keys --/#room42--> exchange socket.io#/#room42",
          ]
        : [expect.stringMatching(/^socket\.io#keys --\/#room42--> queue socket\.io#@/)],
    );
    await bob.socket.join("room42");
    await ann.socket.leave("room42");
    if (haveRoomExchanges) expect(await broker.exchanges("socket.io#")).toContain("socket.io#/#room42");
    bob.client.disconnect();
    await eventually(async () => expect(await ours()).toEqual(before));
    expect((await broker.exchanges("socket.io")).toSorted()).toEqual(["socket.io", "socket.io#keys"]);

    await Promise.all(nodes.map(({ io }) => io.close()));
    expect((await broker.exchanges("socket.io")).toSorted()).toEqual(["socket.io", "socket.io#keys"]);
    expect(await broker.queues("socket.io#")).toEqual([]);
  });

  test("roomExchanges: false binds the queue straight to the keys", async () => {
    const { b } = await crew({ roomExchanges: false });
    expect(await exchanges()).toEqual([]);
    const red = (await bindings()).filter(({ key }) => key === "/#red");
    expect(red.map(({ source, kind }) => [source, kind])).toEqual(Array(2).fill([`${prefix}#keys`, "queue"]));
    await eventually(() => expect(b.adapter.stats.rooms).toBe(2));
  });

  test.if(refuseRoomExchanges)("roomExchanges: true is refused, and said why", async () => {
    const node = await start({ roomExchanges: true });
    const [error] = await once(node.adapter, "error");
    expect(String(error)).toMatch(/roomExchanges: true was refused: the broker's version is 4\./);
    errorsOf(node);
  });

  test.if(haveRoomExchanges)(
    "rooms of a server with up to 100 have exchanges, those of a larger one none",
    async () => {
      const node = await start();
      await node.adapter.ready;
      const { client, socket } = await join(node);
      const rooms = Array.from({ length: 150 }, (_, i) => `room${i}`);
      await socket.join(rooms.slice(0, 90));
      await eventually(async () => expect(await exchanges()).toHaveLength(90));
      await socket.join(rooms);
      await eventually(() => expect(node.adapter.stats.rooms).toBe(150));
      await eventually(async () => expect(await exchanges()).toEqual([]));
      const all = Promise.all(rooms.map((room) => received(client, room)));
      for (const room of rooms) node.io.to(room).emit(room);
      await all;
    },
  );

  test('socketRooms: "bound" binds rooms named like a socket id too', async () => {
    const { a, c, cat, people } = await crew({ socketRooms: "bound" });
    await eventually(() => expect(c.adapter.stats.rooms).toBe(2));
    expect((await bindings()).map(({ key }) => key)).toContain(`/#${cat.socket.id}`);
    a.io.to(cat.socket.id).emit("hello");
    expect(await heardFrom(a.io, people)).toEqual(only("cat", people, ["hello"]));
  });

  test("a server without the room gets none of its messages, also when several rooms are named", async () => {
    const { nodes, a, b, c, people } = await crew({ heartbeatInterval: 60_000, heartbeatTimeout: 120_000 });
    await settled();
    await Promise.all(nodes.map(({ io }) => io.fetchSockets())); // what was said at the start has arrived
    const before = [b, c].map(({ adapter }) => adapter.stats);
    for (let i = 0; i < 10; i++) {
      a.io.to("red").emit("hello");
      a.io.to(["red", "green"]).emit("hello");
      a.io.to("red").except("green").emit("hello", Buffer.from("x"));
    }
    await eventually(() => expect(a.adapter.stats.unconfirmed).toBe(0)); // what follows is for everyone, in a frame of its own
    await heardFrom(a.io, people);
    const packets = [b, c].map(({ adapter }, n) => adapter.stats.packetsReceived - (before[n]?.packetsReceived ?? NaN));
    expect(packets).toEqual([31, 1]); // the one is heardFrom's
  });

  test.if(scansBindings)("peers know of many new bindings before the next heartbeat", async () => {
    const { a, b, c, bob } = await crew({ heartbeatInterval: 60_000, heartbeatTimeout: 120_000 });
    await bob.socket.join(Array.from({ length: 600 }, (_, i) => `room${i}`));
    await eventually(() => expect(b.adapter.stats.rooms).toBe(602), 5_000);
    const before = c.adapter.stats.packetsReceived;
    // With several keys the broker would scan them all: it goes to everyone.
    await eventually(() => {
      a.io.to(["red", "green"]).emit("hello");
      expect(c.adapter.stats.packetsReceived).toBeGreaterThan(before);
    });
  });

  test.if(haveRoomExchanges)(
    "a room whose exchange went with another server's queue is bound again",
    async () => {
      const { a, c, ann, bob } = await crew();
      const connection = await connect(broker.url);
      await (await connection.createChannel()).deleteExchange(`${prefix}#/#red`);
      await connection.close();
      await c.io.close();
      const red = `${prefix}#/#red`;
      await eventually(async () => {
        const all = await bindings();
        expect(
          all.filter(({ source, destination }) => destination === red && source === `${prefix}#keys`),
        ).toHaveLength(1);
        expect(all.filter(({ source }) => source === red)).toHaveLength(2);
      }, 10_000);
      a.io.to("red").emit("hello");
      expect(await heardFrom(a.io, { ann, bob })).toEqual({ ann: [["hello"]], bob: [["hello"]] });
    },
    20_000,
  );

  test.if(haveRoomExchanges)("a room's exchange that was declared just before a loss does not stay", async () => {
    const link = await Proxy.open(broker.port);
    const amqpConnection = async () => {
      const connection = await connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
      const { createChannel } = connection;
      connection.createChannel = async (options) => {
        const channel = await createChannel.call(connection, options);
        const { bindQueue } = channel;
        channel.bindQueue = (queue, exchange, ...more) => {
          if (exchange.endsWith("#red")) link.cut();
          return bindQueue.call(channel, queue, exchange, ...more);
        };
        return channel;
      };
      return connection;
    };
    const node = await start({ amqpConnection });
    await node.adapter.ready;
    const { socket } = await join(node);
    const lost = once(node.adapter, "disconnect");
    await socket.join("red");
    await lost;
    await socket.leave("red");
    expect(await exchanges()).toEqual([`${prefix}#/#red`]);
    link.heal();
    await eventually(async () => expect(await exchanges()).toEqual([]));
    await node.adapter.close();
    link.close();
    errorsOf(node);
  });

  test("queueArguments are the queue's", async () => {
    const { adapter } = await start({ queueArguments: { "x-max-length": 1_000 } });
    await adapter.ready;
    const all = await broker.evaluate<string[][]>(
      `[[Queue, Key, Value] || [{name, {_, _, _, Queue}}, {arguments, Arguments}] <-
        rabbit_amqqueue:info_all(<<"/">>, [name, arguments]), {Key, _, Value} <- Arguments]`,
    );
    expect(all).toContainEqual([expect.stringContaining(`${prefix}#@`), "x-max-length", 1_000]);
  });

  test("what the adapter did stands in its stats", async () => {
    const { a, b, people } = await crew();
    await settled();
    expect(a.adapter.stats).toMatchObject({ connected: true, rooms: 1, packetsSent: 0, lost: 0, lastError: undefined });
    expect(b.adapter.stats).toMatchObject({ connected: true, rooms: 2, reconnects: { consuming: 0, publishing: 0 } });
    for (let i = 0; i < 50; i++) a.io.to("red").emit("hello");
    await heardFrom(a.io, people);
    expect(a.adapter.stats.packetsSent).toBe(51);
    expect(b.adapter.stats.packetsReceived).toBe(51);
    expect(a.adapter.stats.framesSent).toBeLessThanOrEqual(51);
    await eventually(() => expect(a.adapter.stats.unconfirmed).toBe(0));
  });

  test("stats print as a short block, and are a plain object to code", async () => {
    const { adapter } = (await crew()).a;
    await eventually(() => expect(adapter.stats.rooms).toBe(1)); // live before it is bound
    const { stats } = adapter;
    for (const printed of [Bun.inspect(stats), inspect(stats)]) {
      expect(printed.split("\n").length).toBeLessThanOrEqual(6);
      expect(printed).toMatch(/connected; 1 rooms; [^]* lost 0, dropped 0\n  last error: none$/);
    }
    expect(Object.keys(JSON.parse(JSON.stringify(stats)))).toContain("packetsSent");
  });
});

describe("an emitter", () => {
  const emitting = (options: Partial<EmitterOptions> = {}): Emitter => {
    const emitter = createEmitter({ amqpConnection, prefix, ...options });
    closers.push(() => emitter.close());
    return emitter;
  };

  const sharedCrew = shared(async () => {
    const emitter = emitting();
    await emitter.ready;
    return { emitter, ...(await crew()) };
  });
  test.each<[what: string, hearers: string, target: (emitter: Emitter, cat: Member) => Emitting]>([
    ["everyone", "ann bob cat", (emitter) => emitter],
    ["a room", "ann bob", (emitter) => emitter.to("red")],
    ["rooms, once each", "ann bob cat", (emitter) => emitter.to("red").in(["blue", "green"])],
    ["all but a room", "cat", (emitter) => emitter.except("red")],
    ["all but several rooms", "", (emitter) => emitter.except(["red"]).except("blue")],
    ["a room but for a socket", "bob", (emitter, cat) => emitter.to("blue").except(cat.socket.id)],
    ["a socket", "cat", (emitter, cat) => emitter.to(cat.socket.id)],
    ["everyone, volatile", "ann bob cat", (emitter) => emitter.volatile],
    ["everyone, uncompressed", "ann bob cat", (emitter) => emitter.compress(false)],
  ])("reaches %s", async (_, hearers, target) => {
    const { people, cat, emitter } = await sharedCrew();
    const event = ["hello", 1, { deep: [Buffer.from("x")] }];
    target(emitter, cat).emit("hello", ...event.slice(1));
    expect(await heardFrom(emitter, people)).toEqual(only(hearers, people, event));
  });

  test("rejects its close() with the number of packets that did not get out, dropped ones among them", async () => {
    const link = await Proxy.open(broker.port);
    const lost = Promise.withResolvers<void>();
    const emitter = createEmitter({
      amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`),
      prefix,
      journal: { ms: 50 },
      onError: (error) => error.message.includes("publishing") && lost.resolve(),
      closeTimeout: 200,
    });
    await emitter.ready;
    link.cut();
    await lost.promise;
    emitter.emit("hello");
    await expect(emitter.close()).rejects.toThrow("Closed before the broker had confirmed 1 packets");
    link.close();
  });

  test("reaches rooms that it names behind a room that it has just emitted to", async () => {
    const [a, b] = await cluster();
    const [{ client: ann }, { client: bob }] = [await join(a, ["red"]), await join(b, ["blue"])];
    const emitter = emitting();
    await emitter.ready;
    const heard: unknown[][] = [[], []];
    for (const [i, client] of [ann, bob].entries()) client.on("n", (n: number) => heard[i]?.push(n));
    emitter.to("red").emit("n", 1);
    emitter.to(["red", "green"]).emit("n", 2);
    emitter.to(["red", "blue"]).emit("n", 3);
    await eventually(() => expect(heard).toEqual([[1, 2, 3], [3]]));
  });

  test("reaches one namespace, with the types of its events", async () => {
    const [, b] = await cluster();
    const { client } = await join(b, ["red"], "/chat");
    await adapterOf(b.io, "/chat").ready;
    const emitter = createEmitter<{ hello: (name: string, n: number) => void }>({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    const hello = received(client, "hello");
    emitter.of("/chat").to("red").emit("hello", "world", 1);
    // @ts-expect-error: the second argument is a number
    emitter.of("/nobody").emit("hello", "world", "1");
    expect(await hello).toEqual(["world", 1]);
  });

  test("makes sockets join, leave and disconnect", async () => {
    const { a, b, bob, cat, people } = await crew();
    const emitter = emitting();
    emitter.in("blue").socketsJoin(["green", "yellow"]);
    emitter.in("red").socketsLeave("green");
    await heardFrom(emitter, people);
    expect([bob.socket.rooms, cat.socket.rooms].map((rooms) => [rooms.has("green"), rooms.has("yellow")])).toEqual([
      [false, true],
      [true, true],
    ]);
    const gone = [bob, cat].map(({ client }) => received(client, "disconnect"));
    emitter.to("yellow").emit("bye"); // Bob and Cat may not be bound to it yet
    emitter.in("blue").disconnectSockets(true);
    await Promise.all(gone);
    expect(await a.io.fetchSockets()).toHaveLength(1);
    expect(b.io.of("/").sockets.size).toBe(0);
  });

  test("that makes sockets join what is no room harms no server", async () => {
    const { bob, people } = await crew();
    const emitter = emitting();
    emitter.in("blue").socketsJoin([{ toString: "none" }] as unknown as string[]);
    await heardFrom(emitter, people);
    const gone = once(bob.socket, "disconnect");
    bob.client.disconnect();
    await gone;
  });

  test("keeps its rooms in another namespace", async () => {
    const { a, cat } = await crew();
    const [dan, eve] = await Promise.all([join(a, ["red"], "/chat"), join(a, ["blue"], "/chat")]);
    const emitter = emitting();
    emitter.to("blue").of("/chat").emit("hello");
    const people = { cat, dan, eve };
    const heard = heardFrom(emitter, people);
    emitter.of("/chat").emit("end");
    expect(await heard).toEqual(only("eve", people, ["hello"]));
  });

  test("emits to the servers, and is none of them", async () => {
    const nodes = await cluster();
    const emitter = emitting();
    const all = Promise.all(nodes.map(({ io }) => once(io, "hello")));
    emitter.serverSideEmit("hello", "world", Buffer.from("x"));
    expect(await all).toEqual(Array(3).fill(["world", Buffer.from("x")]));
    expect(await nodes[0].adapter.serverCount()).toBe(3);
    expect(() => emitter.serverSideEmit("hello", () => {})).toThrow("leave out the callback");
    expect(() => emitter.emit("hello", () => {})).toThrow("leave out the callback");
    expect(() => emitter.emit("disconnect")).toThrow("reserved");
    expect(() => emitter.serverSideEmit("connection")).toThrow("reserved");
  });

  test("has everything confirmed by the broker when close() resolves", async () => {
    const { cat } = await crew();
    const last = received(cat.client, "last");
    const emitter = createEmitter({ amqpConnection, prefix });
    for (let i = 0; i < 2_000; i++) emitter.to("blue").emit("n", i);
    emitter.emit("last");
    await emitter.close();
    await last;
    expect(cat.heard.slice(0, -1).map(([, i]) => i)).toEqual(Array.from({ length: 2_000 }, (_, i) => i));
    expect(() => emitter.emit("late")).toThrow();
  });

  test("may emit to any number of namespaces, of which it remembers a thousand", async () => {
    const emitter = createEmitter({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    const kept = () => (Bun.gc(true), heapStats().objectTypeCounts["Map"] ?? 0);
    const before = kept();
    for (let i = 0; i < 3_500; i++) emitter.of(`/chat${i}`);
    expect(kept() - before).toBeLessThan(3_500); // three of each
  });

  test("alone leaves nothing behind", async () => {
    const emitter = createEmitter({ amqpConnection, prefix });
    await emitter.ready;
    emitter.to("nobody").emit("hello");
    await emitter.close();
    expect([await exchanges(), await queues()]).toEqual([[], []]);
  });

  test("reports what goes wrong to onError", async () => {
    const reported = Promise.withResolvers<Error>();
    const emitter = createEmitter({ amqpConnection, prefix, maxPayload: 1_000, onError: reported.resolve });
    closers.push(() => emitter.close());
    emitter.emit("big", "x".repeat(2_000));
    expect((await reported.promise).message).toMatch(/maxPayload|1000|1_000/);
  });
});

describe("a JSON array from any AMQP client", () => {
  const sharedCrew = shared(async () => ({ prefix, ...(await crew()) }));
  test.each<[what: string, hearers: string, exchange: string, key: string]>([
    ["under a room's key is for the room", "ann bob", "", "/#red"],
    ["under a namespace's key is for everyone in it", "ann bob cat", "", "/"],
    ["under a room's key, to the keys, is for the room", "ann bob", "#keys", "/#red"],
    ["for an empty room is for nobody", "", "", "/#green"],
    ["for another namespace is for nobody here", "", "", "/chat"],
    ["for a room with no namespace is for nobody", "", "", "#red"],
  ])("%s", async (_, hearers, exchange, key) => {
    const { people, prefix } = await sharedCrew();
    await publish(prefix + exchange, key, '["hello","world",{"n":1}]', JSON_TYPE);
    expect(await heardFrom(anybody(prefix), people)).toEqual(only(hearers, people, ["hello", "world", { n: 1 }]));
  });

  const anybody = (prefix: string) => ({
    emit: (event: string) => publish(prefix, "/", JSON.stringify([event]), JSON_TYPE),
  });

  test.if(haveRoomExchanges)("to a room's exchange, with any key, is for the room", async () => {
    const { people } = await crew();
    for (const key of ["", "whatever"]) await publish(`${prefix}#/#red`, key, '["hello"]', JSON_TYPE);
    const twice = [["hello"], ["hello"]];
    expect(await heardFrom(anybody(prefix), people)).toEqual({ ann: twice, bob: twice, cat: [] });
  });

  test.if(haveRoomExchanges)(
    "with a room of 300 characters goes to the exchange that stands on the broker",
    async () => {
      const { cat } = await crew();
      await cat.socket.join("x".repeat(300));
      const others = ["#/#red", "#/#blue"].map((name) => prefix + name);
      const [exchange = ""] = (await exchanges()).filter((name) => !others.includes(name));
      const hello = received(cat.client, "hello");
      await publish(exchange, "", '["hello"]', JSON_TYPE);
      await hello;
    },
  );
});

describe("a bad message", () => {
  const sharedCrew = shared(async () => ({ prefix, ...(await crew({ maxPayload: 10_000 })) }));
  test.each<[what: string, body: string | Buffer, properties: Amqp.Publish]>([
    ["empty", "", {}],
    ["of random bytes", Buffer.from("c3a1ff0000009f7f8812fe", "hex"), {}],
    ["of text", "hello", { contentType: "text/plain" }],
    ["of broken JSON", '["hello"', JSON_TYPE],
    ["of deep JSON", "[".repeat(100_000), JSON_TYPE],
    ["of a JSON object", '{"hello":"world"}', JSON_TYPE],
    ["of an empty JSON array", "[]", JSON_TYPE],
    ["of an event without a name", "[1]", JSON_TYPE],
    ["of a reserved event", '["disconnect"]', JSON_TYPE],
    ["larger than maxPayload", JSON.stringify(["big", "x".repeat(20_000)]), JSON_TYPE],
  ])("%s is reported and dropped, and the next one is handled", async (_, body, properties) => {
    const { nodes, people, prefix } = await sharedCrew();
    const reported = Promise.all(nodes.map(({ adapter }) => once(adapter, "error")));
    await publish(prefix, "/", body, properties);
    await reported;
    for (const node of nodes) expect(errorsOf(node)).toHaveLength(1);
    expect(await heardFrom(nodes[0].io, people)).toEqual(only("", people, []));
    await reunited(nodes);
  });

  test("straight into a server's queue is reported and dropped", async () => {
    const { nodes } = await crew();
    const reported = Promise.all(nodes.map(({ adapter }) => once(adapter, "error")));
    for (const { name } of await queues()) await publish("", name, "hello", { headers: { a: 1 } });
    await reported;
    for (const node of nodes) expect(errorsOf(node)).toHaveLength(1);
    await reunited(nodes);
  });

  test("of a server whose numbers count nothing is reported and dropped", async () => {
    const { nodes, a, b } = await crew();
    const counts = [-1, 0.5, 1e308, "7", null];
    for (const number of counts) {
      const beat = { type: "beat", revision: 1, bindings: 0, number, floor: 0 };
      const reported = once(b.adapter, "error");
      await publish(`${prefix}#keys`, `@${b.adapter.uid}`, control(a.adapter.uid, JSON.stringify(beat)));
      await reported;
    }
    expect(errorsOf(b)).toHaveLength(counts.length);
    await reunited(nodes);
  });

  test("that was cut short on the way harms nothing", async () => {
    const { nodes, a, people } = await crew();
    const spy = await connect(broker.url);
    closers.push(() => spy.close());
    const channel = await spy.createChannel();
    const { queue } = await channel.assertQueue("", { exclusive: true });
    await channel.bindQueue(queue, prefix, "");
    a.io.emit("hello", { deep: Buffer.from("x") }, "world");
    await eventually(async () => {
      const message = await channel.get(queue, { noAck: true });
      if (!message) throw new Error("no frame yet");
      for (let length = 0; length < message.content.length; length += 3)
        channel.publish(prefix, "/", message.content.subarray(0, length), message.properties);
    });
    await reunited(nodes);
    await heardFrom(a.io, people);
    nodes.forEach(errorsOf);
  });

  test("with nobody listening for errors is dropped as well", async () => {
    const { nodes, people } = await crew();
    for (const { adapter } of nodes) adapter.removeAllListeners("error");
    await publish(prefix, "/", "hello");
    expect(await heardFrom(nodes[0].io, people)).toEqual(only("", people, []));
    await eventually(() => expect(nodes[2].adapter.stats.lastError).toBeInstanceOf(Error));
  });

  test("is none of several packets that only together are over maxPayload", async () => {
    const { a, cat, people } = await crew({ maxPayload: 10_000 });
    const texts = ["a", "é", "語"].map((char) => char.repeat(2_000));
    for (const text of texts) a.io.to("blue").emit("text", text);
    expect((await heardFrom(a.io, people)).cat).toEqual(texts.map((text) => ["text", text]));
    expect(cat.heard).toEqual([]);
  });

  test("is none of many packets whose exceptions only together are over maxPayload", async () => {
    const { a, cat, people } = await crew({ maxPayload: 10_000 });
    const numbers = Array.from({ length: 50 }, (_, i) => i);
    const roomsOf = (i: number) => numbers.map((room) => `nobody is in room ${room} of ${i}`);
    for (const i of numbers) a.io.to("blue").except(roomsOf(i)).emit("number", i);
    expect((await heardFrom(a.io, people)).cat).toEqual(numbers.map((i) => ["number", i]));
    expect(cat.heard).toEqual([]);
  });

  test("a packet that only its many binaries bring over maxPayload is reported where it is emitted", async () => {
    const a = await start({ maxPayload: 20_000 });
    a.io.emit("binaries", ...Array.from({ length: 550 }, () => Buffer.alloc(1)));
    await once(a.adapter, "error");
    expect(errorsOf(a)).toEqual([expect.stringMatching(/not sent.*maxPayload/)]);
  });

  test("larger than this server's own maxPayload costs no other packet of a server whose maxPayload is larger", async () => {
    const [a, b] = await Promise.all([start(), start({ maxPayload: 10_000 })]);
    await acquainted([a, b]);
    const bob = await join(b);
    introduce({ bob });
    for (let i = 0; i < 10; i++) {
      a.io.emit("big", "x".repeat(70_000));
      a.io.emit("small", i);
    }
    expect((await heardFrom(a.io, { bob })).bob).toEqual(Array.from({ length: 10 }, (_, i) => ["small", i]));
    expect(errorsOf(a)).toEqual([expect.stringMatching(/give all of them the same/)]);
    expect(errorsOf(b).filter((error) => /a message of 7\d{4} bytes/.test(error))).toHaveLength(10);
  });

  test("a packet over maxPayload is reported, delivered locally, and costs no other", async () => {
    const { a, people } = await crew({ maxPayload: 10_000 });
    const packets = [
      ["one"],
      ["big", "x".repeat(20_000)],
      ["two"],
      ["big", Buffer.alloc(20_000)],
      ["three", "x".repeat(9_000)],
    ];
    for (const [event = "", ...args] of packets) a.io.emit(String(event), ...args);
    const small = packets.filter(([event]) => event !== "big");
    expect(await heardFrom(a.io, people)).toEqual({ ann: packets, bob: small, cat: small });
    expect(errorsOf(a)).toEqual([expect.stringMatching(/maxPayload/), expect.stringMatching(/maxPayload/)]);
    expect(a.adapter.stats.dropped).toBe(2);
  });

  test("of an unknown version is reported once per sender", async () => {
    const { nodes, people } = await crew();
    const frame = Buffer.alloc(32);
    frame[0] = 3;
    const reported = Promise.all(nodes.map(({ adapter }) => once(adapter, "error")));
    for (const sender of ["somebody", "somebody", "another-"]) {
      frame.write(sender, 2, "latin1");
      await publish(prefix, "/", frame);
    }
    await reported;
    expect(await heardFrom(nodes[0].io, people)).toEqual(only("", people, []));
    for (const node of nodes) expect(errorsOf(node).filter((error) => error.includes("version 3"))).toHaveLength(2);
  });
});

describe("a simulation of senders and receivers", () => {
  /** A frame, and the numbers of its packets, which are negative for volatile ones. */
  type Frame = ReturnType<typeof readFrame> & { readonly contents: readonly number[] };
  /** What a sender says of itself; JSON, where a frame begins with its version. */
  type Control =
    | { type: "beat"; number: number; floor: number }
    | { type: "begin"; id: number; from: number; to: number }
    | { type: "bye"; number: number };
  /** What the broker passes on. */
  interface Message {
    readonly keys: readonly string[];
    readonly again: boolean;
    readonly content: Frame | Control;
    readonly confirmed: () => void;
  }

  /** Times in ms, and sizes that make the limits rare enough but not too rare. */
  const ASK_AGAIN = 30;
  const ANSWER_AGAIN = 60;
  const SILENCE = 400;
  const ROOMS = 10;

  /** Numbers from a seed (mulberry32), so that a schedule that fails can be run again. */
  class Random {
    #state: number;
    constructor(seed: number) {
      this.#state = seed;
    }
    next(): number {
      this.#state = (this.#state + 0x6d2b79f5) | 0;
      let t = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
    }
    readonly chance = (p: number): boolean => this.next() < p;
    readonly below = (n: number): number => Math.floor(this.next() * n);
    readonly pick = <T>(...values: [T, ...T[]]): T => values[this.below(values.length)] ?? values[0];
  }

  const isFrame = (content: Frame | Control): content is Frame => "body" in content;

  function decode(body: Buffer): Frame {
    const frame = readFrame(body);
    const packets = readSections(frame).sections.flatMap(takePackets);
    return { ...frame, contents: packets.map(([text]) => parseInt(String(text))) };
  }

  class Sender {
    readonly publisher: Publisher;
    up = false;
    closed = false;
    /** Published, but not routed yet; routed, but the confirm is still under way. */
    readonly wire: Message[] = [];
    readonly confirms: (() => void)[] = [];
    /** The rooms of each packet; in which connection a volatile one was emitted; what is in each numbered frame. */
    readonly rooms = new Map<number, number[]>();
    readonly #emittedIn = new Map<number, number>();
    readonly frames = new Map<number, readonly number[]>();
    emitted = 0;
    dropped = 0;
    /** Packets of frames that were given up: too large, or too old to be published once more, which are dropped as well. */
    readonly refused = new Set<number>();
    tooOld = 0;
    #volatiles = 0;
    /** Large packets, now and then: a short log forgets them, and only so many bytes are under way at once. */
    readonly #maxLength: number;
    #connection = 0;
    #flushAt = Infinity;
    readonly #routes = new Routes("/", false);
    /** As in `Sender`: the latest question of each receiver and how far its answer is. */
    readonly #answers = new Map<
      Receiver,
      { id: number; after: number | undefined; at: number; next: number; to: number }
    >();
    readonly world: World;

    constructor(world: World) {
      this.world = world;
      const { chance, pick } = world.random;
      this.#maxLength = chance(0.03) ? 50_000 : 200;
      const journal = { bytes: pick(1, 4_096, 2 ** 20, 2 ** 20), ms: pick(60, 1e9, 1e9) };
      const [servers, several] = [pick(1, 20), chance(0.5)];
      this.publisher = new Publisher(
        "sender--",
        { maxQueued: pick(8_000, 1e9, 1e9), maxPayload: pick(2_000, 2 ** 20), journal },
        { servers: () => servers, maxKeyBytes: () => (several ? 200 : 0) },
        {
          dropped: (packets) => (this.dropped += packets),
          flushIn: (ms) => (this.#flushAt = Math.min(this.#flushAt, world.now + ms)),
        },
        () => world.now,
      );
      this.heal();
    }

    emit(): void {
      const { chance, below, pick } = this.world.random;
      const volatile = chance(0.1);
      const n = volatile ? -++this.#volatiles : ++this.emitted;
      const rooms = Array.from({ length: pick(0, 1, 1, 1, 2) }, () => below(ROOMS));
      this.rooms.set(n, rooms);
      if (volatile) this.#emittedIn.set(n, this.#connection);
      const opts = { rooms: new Set(rooms.map((room) => `room${room}`)), ...(volatile && { flags: { volatile } }) };
      const text = `${n} ${"x".repeat(below(this.#maxLength))}`;
      this.publisher.add(this.#routes.packets(opts), [text], text.length);
    }

    beat(): void {
      const { number, floor } = this.publisher;
      this.say("@", { type: "beat", number, floor });
    }

    say(key: string, control: Control): void {
      void this.publisher.sendNow(key, Buffer.from(JSON.stringify(control)));
    }

    heal(): void {
      if (this.up || this.closed) return;
      this.up = true;
      this.#connection++;
      this.publisher.up(({ keys, body, again = false }, outcome) => {
        const content =
          body[0] === "{".charCodeAt(0) ? (JSON.parse(String(body)) as Control) : decode(Buffer.from(body));
        if (isFrame(content)) this.#publish(content, again);
        this.wire.push({ keys, again, content, confirmed: () => outcome("taken") });
      });
    }

    /** What the broker has not got yet is lost, now and then because it was too large. Old confirms say nothing any more. */
    cut(): void {
      if (!this.up) return;
      this.up = false;
      this.wire.length -= this.world.random.below(Math.min(this.wire.length, 5) + 1);
      this.#answers.clear();
      if (this.world.random.chance(0.1)) this.publisher.giveUpLargest();
      for (let number = this.publisher.floor + 1; number <= this.publisher.number; number++) {
        const body = this.publisher.log.get(number);
        if (!body || decode(body).contents.length > 0) continue;
        for (const n of this.frames.get(number) ?? []) this.refused.add(n);
      }
      this.publisher.down();
    }

    /** Sends a goodbye after its last frame. */
    close(): void {
      if (!this.up || this.publisher.batcher.size > 0) return;
      this.say("@", { type: "bye", number: this.publisher.number });
      this.closed = true;
      this.#answers.clear();
    }

    tick(): void {
      if (this.#flushAt <= this.world.now) this.#flushAt = Infinity;
      this.publisher.flush();
      for (const [receiver, answer] of this.#answers)
        for (let i = this.world.random.below(6); i > 0 && answer.next <= answer.to; i--) {
          const body = this.publisher.log.get(answer.next++);
          if (body) void this.publisher.sendNow(receiver.key, body, true);
          else answer.next = Infinity; // it asks again
        }
    }

    /** As `Sender.replay()` does: the same question again is one whose answer is under way, unless that takes too long. */
    answer(receiver: Receiver, id: number, after: number | undefined): void {
      if (!this.up || this.closed) return;
      const { publisher, world } = this;
      const latest = this.#answers.get(receiver);
      if (latest?.id === id && latest.after === after && world.now - latest.at < ANSWER_AGAIN) return;
      publisher.expire();
      const [from, to] = [Math.max((after ?? 0) + 1, publisher.log.first), publisher.number];
      this.say(receiver.key, { type: "begin", id, from, to });
      this.#answers.set(receiver, { id, after, at: world.now, next: from, to });
    }

    #publish({ number, contents }: Frame, again: boolean): void {
      if (number > 0) {
        const before = this.frames.get(number) ?? [];
        if (before.length === 0) this.frames.set(number, contents);
        if (contents.length > 0) return;
        this.tooOld += before.filter((n) => !this.refused.has(n)).length;
        for (const n of before) this.refused.add(n);
        return;
      }
      const isFresh = contents.every((n) => this.#emittedIn.get(n) === this.#connection);
      this.world.check("a volatile packet waits for no connection, and is not replayed", isFresh && !again);
    }
  }

  /** What a receiver has of a sender: its stream, and what the simulation knows of it. */
  class Inbound {
    readonly stream: PeerStream<Frame>;
    askAt = 0;
    /** When the sender's last word came. */
    heardAt: number;
    /** Numbers of frames that were delivered; packets for this receiver, and volatile ones, in the order in which they came. */
    readonly delivered = new Set<number>();
    readonly heard: number[] = [];
    readonly volatile: number[] = [];
    /** Numbers that the sender had forgotten when it was asked, or that nobody can ask for any more. */
    readonly lost = new Set<number>();
    #reported = 0;
    /** The first number that was published after the receiver's first queue was there. */
    readonly first: number;
    readonly sender: Sender;

    constructor(sender: Sender, receiver: Receiver) {
      const { world } = sender;
      this.sender = sender;
      this.heardAt = world.now;
      this.first = receiver.promised.get(sender) ?? 1;
      const deliver = ({ number, contents }: Frame): void => {
        if (number > 0) {
          world.check("a frame comes once, or is lost", !this.delivered.has(number) && !this.lost.has(number));
          this.delivered.add(number);
        } else world.check("no volatile packet comes while frames may be missing", !this.stream.catchUp);
        for (const n of contents)
          if (receiver.wants(sender.rooms.get(n) ?? [])) (n < 0 ? this.volatile : this.heard).push(n);
      };
      const lost = (frames: number): void => void (this.#reported += frames);
      const events = { deliver, lost, replayed: () => {}, duplicate: () => {} };
      this.stream = new PeerStream<Frame>(events, world.random.pick(500, 3_000, 1e9, 1e9));
    }

    begin(from: number, to: number): void {
      const { cursor, catchUp } = this.stream;
      const reported = this.#reported;
      // What a sender published before it was heard for the first time cannot be known to be lost.
      const after = cursor ?? Math.min(from, ...(catchUp?.held.keys() ?? [])) - 1;
      this.stream.begin(from, to);
      if (cursor === undefined) this.#miss(0, after);
      const lost = this.#miss(after, from - 1);
      this.sender.world.check("as many frames are reported as are lost", this.#reported - reported === lost);
    }

    /** The sender has said goodbye after this number, or its queue is gone. */
    giveUp(last?: number): void {
      const { catchUp, cursor } = this.stream;
      const missing = this.stream.giveUp(last);
      if (!catchUp) return;
      const lost = this.#miss(cursor ?? 0, this.sender.publisher.number);
      if (last !== undefined && cursor !== undefined)
        this.sender.world.check("as many frames are given up as are missing", missing === lost);
    }

    #miss(after: number, last: number): number {
      const { size } = this.lost;
      for (let number = after + 1; number <= last; number++) if (!this.delivered.has(number)) this.lost.add(number);
      return this.lost.size - size;
    }
  }

  class Receiver {
    readonly key: string;
    readonly #keys: Set<string>;
    readonly #digests: Set<number>;
    readonly #rooms: Set<number>;
    /** What the broker has for it; undefined while its queue is gone. */
    queue: { readonly sender: Sender; readonly message: Message }[] | undefined;
    /** Per sender, the first number that was published after the first queue was there. */
    readonly promised = new Map<Sender, number>();
    readonly inbound = new Map<Sender, Inbound>();
    #wasAway = false;
    readonly #world: World;

    constructor(world: World, index: number) {
      this.#world = world;
      this.key = `@${index}`;
      const { chance } = world.random;
      const everything = chance(0.3);
      this.#rooms = new Set(Array.from({ length: ROOMS }, (_, room) => room).filter(() => everything || chance(0.5)));
      this.#keys = new Set(["@", this.key, "/", ...[...this.#rooms].map((room) => `/#room${room}`)]);
      this.#digests = new Set(
        [...this.#keys].map((key) => ((Bun.hash.crc32(key) | 1) >>> 0) - Number(key.startsWith("@"))),
      );
    }

    wants = (rooms: number[]): boolean => rooms.length === 0 || rooms.some((room) => this.#rooms.has(room));
    isBound = ({ keys }: Message): boolean => keys.some((key) => this.#keys.has(key));
    predecessors = (frame: Frame, hasNot: (number: number) => boolean = () => true): readonly number[] =>
      predecessorsOf(frame, (digest) => this.#digests.has(digest), hasNot);

    heal(): void {
      if (this.queue) return;
      this.queue = [];
      for (const sender of this.#world.senders)
        if (!this.#wasAway) this.promised.set(sender, sender.publisher.number + 1);
      for (const inbound of this.inbound.values()) {
        inbound.stream.startCatchUp();
        inbound.askAt = 0;
      }
    }

    /** The queue goes with what it holds. */
    cut(): void {
      if (!this.queue) return;
      this.queue = undefined;
      this.#wasAway = true;
    }

    /** As `Inbox` does: who is heard for the first time may have begun during an outage. */
    #hear(sender: Sender): Inbound {
      let inbound = this.inbound.get(sender);
      if (!inbound) {
        this.inbound.set(sender, (inbound = new Inbound(sender, this)));
        if (this.#wasAway) inbound.stream.startCatchUp();
      }
      inbound.heardAt = this.#world.now;
      return inbound;
    }

    /** As `Inbox` does. */
    receive(): void {
      const next = this.queue?.shift();
      if (!next) return;
      const { sender, message } = next;
      const { content, again } = message;
      const inbound = this.#hear(sender);
      const { stream } = inbound;
      if (isFrame(content)) {
        if (!again) return stream.receive(content, this.predecessors(content, stream.hasNot));
        const isNext = stream.receiveAgain(content);
        if (!isNext) stream.startCatchUp();
        inbound.askAt = isNext ? this.#world.now + ASK_AGAIN : 0;
      } else if (content.type === "beat") stream.hears(content.number, content.floor);
      else if (content.type === "bye") inbound.giveUp(content.number);
      else if (stream.catchUp?.id === content.id) {
        inbound.askAt = this.#world.now + ASK_AGAIN;
        inbound.begin(content.from, content.to);
      }
    }

    /** As `Membership` does; some questions get lost. A sender that has closed does not answer. */
    ask(): void {
      const { now, random } = this.#world;
      if (!this.queue) return;
      for (const [sender, inbound] of this.inbound) {
        const { catchUp, cursor } = inbound.stream;
        if (!catchUp || inbound.askAt > now) continue;
        inbound.askAt = now + ASK_AGAIN;
        if (sender.closed && now - inbound.heardAt > SILENCE) inbound.giveUp();
        else if (random.chance(0.9)) sender.answer(this, catchUp.id, cursor);
      }
    }
  }

  class World {
    now = 0;
    readonly random: Random;
    readonly senders: Sender[] = [];
    readonly receivers: Receiver[] = [];
    readonly #seed: number;

    constructor(seed: number) {
      this.#seed = seed;
      this.random = new Random(seed);
      const { chance, pick } = this.random;
      for (let i = pick(1, 1, 2); i > 0; i--) this.senders.push(new Sender(this));
      for (let i = pick(1, 1, 2); i > 0; i--) this.receivers.push(new Receiver(this, i));
      for (const receiver of this.receivers) if (chance(0.8)) receiver.heal();
    }

    check(what: string, holds: boolean): void {
      if (!holds) throw new Error(`SEED=${this.#seed}: ${what}`);
    }

    /** The broker gives a message to the queues that it is for. */
    #route(sender: Sender, message: Message, except?: Receiver): void {
      const isNumbered = isFrame(message.content) && message.content.number > 0;
      for (const receiver of this.receivers) {
        if (receiver === except || !receiver.isBound(message)) continue;
        if (message.again && this.random.chance(0.01)) continue; // a replay that loses a frame
        receiver.queue?.push({ sender, message });
        if (isNumbered && this.random.chance(0.01)) receiver.queue?.push({ sender, message });
      }
      sender.confirms.push(message.confirmed);
    }

    /** Nodes of a cluster lose touch: one queue gets some frames late or never, as a frame behind them tells. */
    #scramble(sender: Sender): void {
      const { chance, below, pick } = this.random;
      const count = 1 + below(3);
      const receiver = pick(this.receivers[0]!, ...this.receivers);
      const early = sender.wire.slice(0, count);
      const last = sender.wire[count];
      if (!last || !isFrame(last.content) || receiver.inbound.get(sender)?.stream.cursor === undefined) return;
      if (![...early, last].every((message) => !message.again && receiver.isBound(message))) return;
      const told = receiver.predecessors(last.content);
      if (!early.every(({ content }) => isFrame(content) && told.includes(content.number))) return;
      sender.wire.splice(0, count + 1);
      for (const message of early) this.#route(sender, message, receiver);
      this.#route(sender, last);
      for (const message of early) if (chance(0.5)) receiver.queue?.push({ sender, message });
    }

    /** Time passes; each part gets on with a part of what it has to do, or in the end with all of it. */
    #work(ms: number, part: (of: number) => number): void {
      this.now += ms;
      for (const sender of this.senders) {
        if (!sender.closed) sender.tick();
        for (const message of sender.wire.splice(0, part(sender.wire.length))) this.#route(sender, message);
        for (const confirm of sender.confirms.splice(0, part(sender.confirms.length))) confirm();
      }
      for (const receiver of this.receivers) {
        for (let i = part(receiver.queue?.length ?? 0); i > 0; i--) receiver.receive();
        receiver.ask();
      }
    }

    step(): void {
      const { chance, below } = this.random;
      for (const sender of this.senders) {
        if (sender.closed) continue;
        for (let i = chance(0.4) ? below(6) : 0; i > 0; i--) sender.emit();
        if (chance(0.1)) sender.beat();
        if (chance(0.05)) sender.publisher.block(chance(0.5));
        if (chance(0.1)) this.#scramble(sender);
        if (chance(0.05)) sender.cut();
        else if (chance(0.3)) sender.heal();
        if (chance(0.002)) sender.close();
      }
      for (const receiver of this.receivers)
        if (chance(0.05)) receiver.cut();
        else if (chance(0.3)) receiver.heal();
      this.#work(below(15), (of) => below(of + 1));
    }

    /** All connections stay up from here on, until nothing is left to do. */
    settle(): void {
      for (const receiver of this.receivers) receiver.heal();
      for (const sender of this.senders) {
        sender.heal();
        sender.publisher.block(false);
        if (!sender.closed) sender.beat();
      }
      const isBusy = () =>
        this.senders.some(
          ({ publisher, wire, closed }) => wire.length > 0 || (!closed && publisher.unconfirmedPackets > 0),
        ) ||
        this.receivers.some(
          ({ queue, inbound }) => queue?.length || [...inbound.values()].some(({ stream }) => stream.catchUp),
        );
      for (let i = 0; i < 500 && isBusy(); i++) this.#work(20, (of) => of);
      this.check("it comes to rest", !isBusy());
    }

    verify(): void {
      const inOrder = (numbers: number[]) =>
        numbers.every((n, i) => i === 0 || Math.abs(n) > Math.abs(numbers[i - 1] ?? 0));
      for (const sender of this.senders) {
        const { publisher, frames, emitted, dropped, tooOld, closed } = sender;
        const published = [...frames.values()].flat();
        this.check("packets are published in order, once", inOrder(published));
        this.check("packets are published, or reported as dropped", published.length + dropped - tooOld === emitted);
        this.check("nothing is left in the batcher", publisher.batcher.bytes === 0 && publisher.batcher.size === 0);
        this.check("all is confirmed", closed || publisher.floor === publisher.number);
        for (const receiver of this.receivers) {
          const inbound = receiver.inbound.get(sender);
          if (!inbound && closed) continue; // it came and went during an outage
          const { heard = [], volatile = [], lost = new Set<number>() } = inbound ?? {};
          this.check("packets come in order, once", inOrder(heard) && inOrder(volatile));
          const got = new Set(heard);
          for (const [number, packets] of frames)
            for (const n of packets)
              if (number >= (receiver.promised.get(sender) ?? Infinity) && receiver.wants(sender.rooms.get(n) ?? []))
                this.check(
                  "a packet comes, or is reported as lost",
                  got.has(n) || lost.has(number) || sender.refused.has(n),
                );
        }
      }
    }
  }

  test("loses, doubles and reorders nothing in ten thousand schedules", async () => {
    const { SEED, SCHEDULES = SEED ? 1 : 10_000 } = process.env;
    const base = Number(SEED ?? Math.floor(Math.random() * 2 ** 31));
    for (let i = 0; i < Number(SCHEDULES); i++) {
      const world = new World(base + i);
      for (let steps = 15 + world.random.below(50); steps > 0; steps--) world.step();
      world.settle();
      world.verify();
      await Promise.all(world.senders.map(({ closed, publisher }) => closed || publisher.drained()));
    }
  }, 60_000);
});

describe("a stream", () => {
  test("gives nothing again that has come, though a heartbeat from before it comes late", () => {
    const delivered: number[] = [];
    const deliver = ({ number }: ReturnType<typeof readFrame>) => void delivered.push(number);
    const stream = new PeerStream({ deliver, replayed() {}, duplicate() {}, lost() {} }, 1e6);
    const frame = (number: number) => ({
      kind: 1,
      sender: "sender--",
      number,
      floor: 0,
      packets: 1,
      body: Buffer.of(),
    });
    for (const number of [1, 2, 3, 4]) stream.receive(frame(number));
    stream.hears(2, 0);
    for (const number of [3, 4, 5]) stream.receive(frame(number));
    expect(delivered).toEqual([1, 2, 3, 4, 5]);
  });
});

describe("a publisher", () => {
  const limits = { maxQueued: 1e9, maxPayload: 2 ** 24, journal: { bytes: 2 ** 24, ms: 60_000 } };
  const facts = { servers: () => 3, maxKeyBytes: () => 1e5 };
  const routes = new Routes("/", false);
  const emit = (publisher: Publisher, room: string, text = "", volatile = false) => {
    const flags = volatile ? { volatile } : {};
    publisher.add(routes.packets({ rooms: new Set([room]), flags }), [text], text.length);
    publisher.flush();
  };

  test("names the unconfirmed frames before a frame, whatever volatile ones are between", () => {
    let now = 0;
    const publisher = new Publisher("sender--", limits, facts, { dropped() {}, flushIn() {} }, () => (now += 20));
    const bodies: Buffer[] = [];
    publisher.up(({ body }) => bodies.push(Buffer.from(body)));
    emit(publisher, "red");
    for (let i = 0; i < 10; i++) emit(publisher, `room${i}`, "", true);
    emit(publisher, "blue");
    const isTrue = () => true;
    expect(predecessorsOf(readFrame(bodies.at(-1)!), isTrue, isTrue)).toEqual([1]);
  });

  test("counts what is unconfirmed once, though a connection is lost as soon as it is there", () => {
    const publisher = new Publisher("sender--", limits, facts, { dropped() {}, flushIn() {} });
    publisher.up(() => {});
    for (let i = 0; i < 20; i++) emit(publisher, "red", "x".repeat(60_000));
    publisher.down();
    publisher.up((_, confirmed) => confirmed("lost"));
    const confirms: (() => void)[] = [];
    publisher.up((_, confirmed) => confirms.push(() => confirmed("taken")));
    for (let confirm = confirms.shift(); confirm; confirm = confirms.shift()) confirm();
    expect([publisher.unconfirmed, publisher.batcher.size]).toEqual([0, 0]);
  });

  test("sends a room's packets to everyone while a join of others' sockets may wait, and shortly after", () => {
    let since: number | undefined;
    const ours = new Routes("/", false, () => since);
    const keysAfter = (ms: number) => {
      now.mockReturnValue(start + ms);
      return ours.packets({ rooms: new Set(["red"]) }).keys;
    };
    const start = performance.now();
    const now = spyOn(performance, "now");
    try {
      ours.joinFromAfar(["red"]);
      expect(keysAfter(15_000)).toEqual(["/"]); // the broker is away
      since = start + 20_000;
      expect(keysAfter(29_000)).toEqual(["/"]);
      expect(keysAfter(31_000)).toEqual(["/#red"]);
    } finally {
      now.mockRestore();
    }
  });

  test("is drained once what waited is dropped", async () => {
    let now = 0;
    const publisher = new Publisher("sender--", limits, facts, { dropped() {}, flushIn() {} }, () => now);
    emit(publisher, "red");
    const drained = publisher.drained();
    now = 60_001;
    publisher.expire();
    await drained;
  });

  test("publishes no packets again that are older than the journal, for peers may have forgotten that they have them", () => {
    let now = 0;
    let dropped = 0;
    const events = { dropped: (packets: number) => void (dropped += packets), flushIn() {} };
    const publisher = new Publisher("sender--", limits, facts, events, () => now);
    publisher.up(() => {});
    emit(publisher, "red");
    now = 60_001;
    publisher.down();
    const frames: ReturnType<typeof readFrame>[] = [];
    publisher.up(({ body }) => frames.push(readFrame(Buffer.from(body))));
    now += 20;
    emit(publisher, "red");
    expect(frames.map(({ number, packets }) => [number, packets])).toEqual([
      [1, 0],
      [2, 1],
    ]);
    expect(dropped).toBe(1);
  });
});

describe("an adapter", () => {
  test("starts by itself: Socket.IO starts none before 4.8.2", async () => {
    const { io } = await host();
    const adapter = createAdapter({ amqpConnection, prefix })(io.of("/alone"));
    closers.push(() => adapter.close());
    await adapter.ready;
  });

  test("that takes the place of one from another copy of the module closes it", async () => {
    const [a, b] = await cluster();
    const copy = `${import.meta.dir}/.copy-${process.pid}.ts`;
    await Bun.write(copy, Bun.file(`${import.meta.dir}/index.ts`));
    closers.push(() => Bun.file(copy).delete());
    const again: typeof import("./index") = await import(copy);
    a.io.adapter(again.createAdapter({ amqpConnection, prefix }));
    const { adapter } = a.io.of("/");
    if (!(adapter instanceof again.AmqpAdapter)) throw new Error("not replaced");
    await adapter.ready;
    await eventually(async () => expect(await b.adapter.serverCount()).toBe(3));
    await eventually(async () => expect(await queues()).toHaveLength(3));
  });

  test("is ready when init() resolves, also the second time, and has a name in the cluster", async () => {
    const node = await start();
    await node.adapter.init();
    expect(node.adapter.stats.connected).toBe(true);
    await node.adapter.init();
    expect((await queues()).map(({ name }) => name)).toEqual([expect.stringContaining(node.adapter.uid)]);
  });

  test("knows the other servers when it is ready", async () => {
    const { people } = await crew();
    const d = await start();
    await d.adapter.ready;
    expect(await d.adapter.serverCount()).toBe(4);
    expect(await d.io.fetchSockets()).toHaveLength(3);
    expect(await d.io.timeout(2_000).emitWithAck("name?")).toHaveLength(Object.keys(people).length);
  });

  test("forgets at each heartbeat where packets for a room go", async () => {
    const { adapter } = await start({ heartbeatInterval: 50 });
    const destination = () => adapter["routes"].packets({ rooms: new Set(["red"]) });
    const first = destination();
    expect(destination()).toBe(first);
    await eventually(() => expect(destination()).not.toBe(first));
  });

  test("says which connection comes and goes", async () => {
    const node = await start();
    const said: string[] = [];
    for (const event of ["connect", "disconnect"])
      node.adapter.on(event, (connection: string) => said.push(`${event} ${connection}`));
    await node.adapter.ready;
    const link = once(node.adapter, "disconnect");
    await closeConnections();
    await link;
    await eventually(() => expect(said.filter((line) => line === "connect consuming")).toHaveLength(2), 5_000);
    expect(new Set(said)).toEqual(
      new Set(["connect consuming", "connect publishing", "disconnect consuming", "disconnect publishing"]),
    );
    errorsOf(node);
  }, 20_000);

  test("whose namespace a client opens lets it hear what others emit from then on", async () => {
    const [a, b] = await cluster(undefined, { cleanupEmptyChildNamespaces: true });
    for (const { io } of [a, b]) io.of(/^\/dynamic-\d+$/);
    for (let i = 0; i < 20; i++) {
      const { client } = await join(b, [], `/dynamic-${i}`);
      const hello = received(client, "hello");
      a.io.of(`/dynamic-${i}`).emit("hello"); // which a has not open either
      await hello;
      client.disconnect();
    }
  });

  test("reports settings that differ from a peer's, once, with both values", async () => {
    const [a, b] = await Promise.all([start(), start({ journal: { ms: 30_000 } })]);
    await acquainted([a, b]);
    for (const [node, here, there] of [
      [a, 60_000, 30_000],
      [b, 30_000, 60_000],
    ] as const)
      await eventually(() => {
        const said = errors.get(node.adapter)?.map(String) ?? [];
        expect(said).toEqual([expect.stringContaining(`journal.ms is ${here} here and ${there} on peer`)]);
      });
    [a, b].forEach(errorsOf);
  });

  test("reports an emitter with another parser, as the emitter does", async () => {
    const a = await start();
    await a.adapter.ready;
    const reported = Promise.withResolvers<Error>();
    const emitter = createEmitter({ amqpConnection, prefix, parser: msgpack, onError: reported.resolve });
    closers.push(() => emitter.close());
    expect((await reported.promise).message).toMatch(/^parser is ".*" here and "2\[\\"name\\"\]" on peer/s);
    await eventually(() => expect(errors.get(a.adapter)).toHaveLength(1));
    expect(errorsOf(a)).toEqual([expect.stringMatching(/parser is "2\[\\"name\\"\]" here and/)]);
  });

  test("works with a parser that takes only the events it knows, and encodes each time in another way", async () => {
    const events = ["n", "end"];
    class Encoder extends msgpack.Encoder {
      #packets = 0;
      override encode(packet: Parameters<msgpack.Encoder["encode"]>[0]) {
        const [event] = Array.isArray(packet.data) ? packet.data : [];
        if (packet.type === 2 && !events.includes(event)) throw new TypeError(`there is no event ${event}`);
        return super.encode({ ...packet, packets: ++this.#packets } as typeof packet);
      }
    }
    const parser = { ...msgpack, Encoder };
    const { a, people } = await crew({}, { parser, connectionStateRecovery: {} }, { parser: msgpack });
    a.io.emit("n", 1);
    const heard = await heardFrom(a.io, people);
    expect(Object.values(heard).map(([event]) => event?.slice(0, 2))).toEqual(Array(3).fill(["n", 1]));
  });

  test("whose errors nobody listens to warns the process, once per kind", async () => {
    const program = child(`
      process.on("warning", ({ name, message }) => console.log(name, message));
      const { createServer } = await import("node:net");
      const io = new Server(0, { serveClient: false, adapter: createAdapter({ prefix, amqpConnection: () => connect("amqp://127.0.0.1:1") }) });
      setTimeout(() => io.close(), 800);`);
    const lines = (await program.stdout.text()).split("\n").filter((line) => line.startsWith("SocketIoAmqp"));
    expect(lines.map((line) => /consuming|publishing/.exec(line)?.[0]).toSorted()).toEqual(["consuming", "publishing"]);
  });

  test("warns once of foreign messages that it cannot read", async () => {
    const program = child(`
      process.on("warning", ({ name, message }) => console.log(name, message));
      ${A_SERVER}
      console.log("ready");
      io.on("bye", () => io.close());`);
    const output: string[] = [];
    for await (const text of program.stdout.pipeThrough(new TextDecoderStream())) {
      output.push(text);
      if (!text.includes("ready")) continue;
      for (let i = 0; i < 3; i++) await publish(prefix, "/", `"message ${"i".repeat(i)}"`, JSON_TYPE);
      const emitter = createEmitter({ amqpConnection, prefix });
      emitter.serverSideEmit("bye");
      await emitter.close();
    }
    const lines = output.join("").split("\n");
    expect(lines.filter((line) => line.startsWith("SocketIoAmqp"))).toHaveLength(1);
  });

  test("warns once of several peers with the same difference", async () => {
    const nodes = await Promise.all([start(), start()]);
    const program = child(`
      process.on("warning", ({ name, message }) => console.log(name, message));
      const journal = { ms: 30_000 };
      const io = new Server(0, { serveClient: false, adapter: createAdapter({ amqpConnection, prefix, journal }) });
      await io.of("/").adapter.ready;
      while (await io.of("/").adapter.serverCount() < 3) await Bun.sleep(20);
      await io.close();`);
    const lines = (await program.stdout.text()).split("\n").filter((line) => line.startsWith("SocketIoAmqp"));
    expect(lines).toEqual([expect.stringContaining("journal.ms is 30000 here and 60000 on peer")]);
    nodes.forEach(errorsOf);
  });

  test("forgets the answers that did not come to an acknowledged broadcast of another server", async () => {
    const [a, b] = await cluster();
    const { socket } = await join(b);
    await expect(a.io.timeout(100).emitWithAck("nobody answers")).rejects.toThrow();
    const { acks } = socket as unknown as { acks: Map<number, unknown> };
    expect(acks.size).toBe(1);
    await eventually(() => expect(acks.size).toBe(0), 3_000);
  });
});

describe("options", () => {
  const required = { amqpConnection: () => connect("amqp://127.0.0.1:1") };
  test.each<[option: string, value: unknown, expected: RegExp]>([
    ["amqpConnection", undefined, /function.*undefined/],
    ["amqpConnection", "amqp://localhost", /function.*amqp:\/\/localhost/],
    ["prefix", 42, /string.*42/],
    ["prefix", "", /string/],
    ["roomExchanges", "no", /true|false|boolean.*no/],
    ["socketRooms", "all", /shared.*bound.*all/],
    ["requestsTimeout", "5s", /number.*5s/],
    ["requestsTimeout", -1, /positive.*-1/],
    ["heartbeatInterval", NaN, /number.*NaN/],
    ["heartbeatTimeout", 0, /positive.*0/],
    ["queueArguments", [], /object.*\[/],
    ["maxPayload", "16 MiB", /number.*16 MiB/],
    ["prefix", "a\nb", /line ends/],
    ["journal", 5, /bytes.*ms.*5/],
    ["journal", { bytes: "1 MB" }, /bytes.*1 MB/],
    ["journal", { ms: -1 }, /ms.*-1/],
  ])("%s: %j is refused by name, with what was expected", (option, value, expected) => {
    const create = () => createAdapter({ ...required, [option]: value });
    expect(create).toThrow(TypeError);
    expect(create).toThrow(option);
    expect(create).toThrow(expected);
  });

  test("that an emitter has are checked as well", () => {
    expect(() => createEmitter({ ...required, prefix: 42 as unknown as string })).toThrow(TypeError);
    const onError = "log" as unknown as () => void;
    expect(() => createEmitter({ ...required, onError })).toThrow(/onError.*function.*log/);
    expect(() => createEmitter({} as EmitterOptions)).toThrow(/amqpConnection/);
    expect(() => createAdapter(undefined as unknown as AdapterOptions)).toThrow(TypeError);
  });

  test("left undefined have their defaults", async () => {
    const none = { prefix: undefined, journal: { ms: undefined }, socketRooms: undefined };
    const make: (nsp: Namespace) => AmqpAdapter = createAdapter({ ...required, ...none });
    const { io } = await host();
    const adapter = make(io.of("/alone"));
    adapter.on("error", () => {}); // there is no broker
    closers.push(() => adapter.close());
    const journal = { bytes: 64 * 2 ** 20, ms: 60_000 };
    expect(adapter["node"].settings).toMatchObject({ prefix: "socket.io", journal, socketRooms: "shared" });
  });

  test("may be getters and methods of a class", async () => {
    class Configuration implements AdapterOptions, EmitterOptions {
      readonly #url = broker.url;
      readonly #reported = Promise.withResolvers<Error>();
      amqpConnection() {
        return connect(this.#url);
      }
      get prefix() {
        return prefix;
      }
      onError(error: Error) {
        this.#reported.resolve(error);
      }
      get reported() {
        return this.#reported.promise;
      }
    }
    const { io } = await host();
    io.adapter(createAdapter(new Configuration()));
    await adapterOf(io).ready;
    const configuration = new Configuration();
    const emitter = createEmitter(configuration);
    closers.push(() => emitter.close());
    emitter.emit("too large", Buffer.alloc(2 ** 24));
    expect(String(await configuration.reported)).toContain("maxPayload");
    expect(await queues()).toHaveLength(1);
  });
});

describe("a process", () => {
  const nowhere = `() => connect("amqp://127.0.0.1:1")`;
  const programs = {
    "with a server": `${A_SERVER} io.of("/").adapter.addAll("id", new Set(["red"])); io.emit("hello"); await io.close();`,
    "with another namespace": `${A_SERVER} io.of("/chat"); await io.of("/chat").adapter.ready; await io.close();`,
    "with a server closed before it was connected": `
      const io = new Server(0, { adapter: createAdapter({ amqpConnection, prefix }) });
      await io.close();`,
    "with a server closed while the broker is away": `
      const io = new Server(0, { adapter: createAdapter({ amqpConnection: ${nowhere}, prefix }) });
      await new Promise((resolve) => io.of("/").adapter.once("error", resolve));
      await io.close();`,
    "with two servers that close together": `
      const servers = [1, 2].map(() => new Server(0, { adapter: createAdapter({ amqpConnection, prefix }) }));
      for (const io of servers) await io.of("/").adapter.ready;
      const rooms = Array.from({ length: 60 }, (_, i) => "room" + i);
      for (const io of servers) await io.of("/").adapter.addAll("id", new Set(rooms));
      while (servers.some((io) => io.of("/").adapter.stats.rooms < 60)) await Bun.sleep(10);
      await Promise.all(servers.map((io) => io.close()));`,
    "with an emitter": `
      const emitter = createEmitter({ amqpConnection, prefix });
      emitter.emit("hello");
      await emitter.close();`,
  };
  test.each(Object.entries(programs))("%s ends by itself after close()", async (_, source) => {
    const { exited, stdout, stderr } = child(`${source}
      console.log("closed");
      const closedAt = performance.now();
      process.on("exit", () => performance.now() - closedAt > 1_000 && console.log("late"));`);
    expect(await exited).toBe(0);
    expect([await stdout.text(), await stderr.text()]).toEqual(["closed\n", ""]);
  });

  test("loads nothing at run time but the peer dependencies", async () => {
    const source = await Bun.file(new URL("index.ts", import.meta.url)).text();
    const imports = new Bun.Transpiler({ loader: "ts" }).scanImports(source);
    expect(imports.map(({ path }) => path).filter((path) => !path.startsWith("node:"))).toEqual(["socket.io-adapter"]);
  });
});

test("nothing of all this is left on the broker", nothingIsLeft);
