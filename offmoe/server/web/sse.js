// Server-sent events of a response that was fetched: each has its data, or a comment.

export async function* readEvents(body) {
  const decoder = new TextDecoder();
  let held = "";
  for await (const piece of chunks(body)) {
    held += decoder.decode(piece, { stream: true });
    for (let end = held.indexOf("\n\n"); end >= 0; end = held.indexOf("\n\n")) {
      const lines = held.slice(0, end).split("\n");
      held = held.slice(end + 2);
      const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      const comment = lines.filter((line) => line.startsWith(":")).map((line) => line.slice(1).trim()).join(" ");
      yield { data, comment };
    }
  }
}

async function* chunks(body) {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
