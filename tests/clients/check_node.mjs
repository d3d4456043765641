// Clients in JavaScript: OpenAI's own and the Vercel AI SDK. Each outcome is a line of JSON, as harness.py writes it.

import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const url = process.env.AIOENGINE_URL;
const modules = process.env.AIOENGINE_NODE_MODULES;
const require = createRequire(join(modules, "x.js"));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const versionOf = (name) => JSON.parse(readFileSync(join(modules, name, "package.json"), "utf8")).version;

const { default: OpenAI } = await load("openai");
const { z } = await load("zod");
const ai = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");

const model = "smollm2-135m";
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const provider = createOpenAICompatible({
  name: "aioengine", baseURL: `${url}/v1`, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true,
});
const small = { max_tokens: 60, temperature: 0 };
const City = z.object({ name: z.string(), is_capital: z.boolean() });

function expect(condition, what) {
  if (!condition) throw new Error(`not so: ${what}`);
}

async function check(name, client, run) {
  const began = performance.now();
  let error = null;
  try {
    await run();
  } catch (raised) {
    console.error(raised);
    error = `${raised.name}: ${raised.message}`.slice(0, 300);
  }
  const seconds = Math.round((performance.now() - began) / 100) / 10;
  console.log(JSON.stringify({ client: `npm ${client}`, version: versionOf(client), check: name, error, seconds }));
}

await check("chat, streamed with usage, abort", "openai", async () => {
  const answer = await client.chat.completions.create({ model, messages, ...small });
  const stream = await client.chat.completions.create({
    model, messages, ...small, stream: true, stream_options: { include_usage: true },
  });
  let text = "", usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  expect(text === answer.choices[0].message.content, "both texts are equal");
  expect(usage?.completion_tokens > 0, "usage is told");
  const long = await client.chat.completions.create({ model, messages, max_tokens: 300, stream: true });
  for await (const _chunk of long) break;
});

await check("runTools", "openai", async () => {
  let seen = null;
  const runner = client.chat.completions.runTools({
    model, messages, ...small, tool_choice: "required",
    tools: [{
      type: "function",
      function: {
        name: "get_weather", description: "The weather in a city", parse: JSON.parse,
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
        function: (given) => { seen = given; runner.abort(); return "sunny"; },
      },
    }],
  });
  await runner.done().catch(() => {});
  expect(Object.keys(seen ?? {}).join() === "city", `the function is called, got ${JSON.stringify(seen)}`);
});

await check("responses: create and stream", "openai", async () => {
  const answer = await client.responses.create({ model, input: "Say hello.", max_output_tokens: 16, temperature: 0 });
  const stream = await client.responses.create({
    model, input: "Say hello.", max_output_tokens: 16, temperature: 0, stream: true,
  });
  let text = "";
  for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
  expect(answer.output_text && text === answer.output_text, "both texts are equal");
});

const options = { model: provider(model), temperature: 0, maxOutputTokens: 60, maxRetries: 0 };

await check("generateText, streamText, completion model", "ai", async () => {
  const answer = await ai.generateText({ ...options, prompt: "Say hello." });
  const stream = ai.streamText({ ...options, prompt: "Say hello." });
  let text = "";
  for await (const part of stream.textStream) text += part;
  expect(text === answer.text && text, "both texts are equal");
  expect((await stream.usage).outputTokens > 0, "usage is told");
  const plain = await ai.generateText({ ...options, model: provider.completionModel(model), prompt: "One two" });
  expect(plain.text, "there is a text");
});

await check("generateObject, tools", "ai", async () => {
  const made = await ai.generateObject({ ...options, schema: City, prompt: "Tell me about Paris." });
  expect(typeof made.object.is_capital === "boolean", "the object is of the schema");
  const called = await ai.generateText({
    ...options, messages, toolChoice: "required",
    tools: { get_weather: ai.tool({ description: "The weather in a city", inputSchema: z.object({ city: z.string() }) }) },
  });
  expect(called.toolCalls.length === 1 && called.toolCalls[0].input.city, "the tool is called");
});
