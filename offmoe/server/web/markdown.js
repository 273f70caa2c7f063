// Markdown to elements. Nothing is ever parsed as HTML: text goes into text nodes only.

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;

export function renderMarkdown(text, target) {
  const made = document.createDocumentFragment();
  blocks(text.split("\n"), made);
  target.replaceChildren(made);
}

function blocks(lines, parent) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (fence) at = code(lines, at, fence, parent);
    else if (!line.trim()) at += 1;
    else if (/^#{1,6} /.test(line)) {
      const level = line.indexOf(" ");
      inline(line.slice(level + 1), add(parent, `h${Math.min(6, level + 2)}`));
      at += 1;
    } else if (/^ {0,3}([-*_])( *\1){2,} *$/.test(line)) { add(parent, "hr"); at += 1; }
    else if (/^ {0,3}>/.test(line)) {
      const inner = [];
      while (at < lines.length && /^ {0,3}>/.test(lines[at])) inner.push(lines[at++].replace(/^ {0,3}> ?/, ""));
      blocks(inner, add(parent, "blockquote"));
    } else if (isItem(line)) at = list(lines, at, parent);
    else if (line.includes("|") && /^ *\|?[ :|-]*-[ :|-]*\|?[ :|-]*$/.test(lines[at + 1] || "")) at = table(lines, at, parent);
    else at = paragraph(lines, at, parent);
  }
}

function code(lines, at, fence, parent) {
  const inner = [];
  const end = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},} *$`);
  for (at += 1; at < lines.length && !end.test(lines[at]); at += 1) inner.push(lines[at]);
  const box = add(parent, "div", "code");
  const block = add(add(box, "pre"), "code");
  if (fence[2]) block.dataset.language = fence[2];
  block.textContent = inner.join("\n");
  const button = add(box, "button", "copy");
  button.type = "button";
  button.textContent = "Copy";
  return at + 1;
}

function isItem(line) {
  return /^\s*([-*+]|\d{1,9}[.)]) +\S/.test(line);
}

function list(lines, at, parent) {
  const ordered = /^\s*\d/.test(lines[at]);
  const made = add(parent, ordered ? "ol" : "ul");
  if (ordered) made.start = parseInt(lines[at].trim(), 10);
  const indent = lines[at].search(/\S/);
  while (at < lines.length && isItem(lines[at]) && lines[at].search(/\S/) >= indent) {
    const mark = /^\s*([-*+]|\d{1,9}[.)]) +/.exec(lines[at])[0];
    const inner = [lines[at].slice(mark.length)];
    for (at += 1; at < lines.length; at += 1) {
      const depth = lines[at].search(/\S/);
      if (depth < 0 ? !/^\s+\S/.test(lines[at + 1] || "") : depth <= indent) break;
      inner.push(lines[at].slice(Math.min(mark.length, Math.max(depth, 0))));
    }
    const item = add(made, "li");
    if (inner.length === 1) inline(inner[0], item);
    else blocks(inner, item);
  }
  return at;
}

function table(lines, at, parent) {
  const made = add(parent, "table");
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const head = add(add(made, "thead"), "tr");
  for (const cell of cells(lines[at])) inline(cell, add(head, "th"));
  const body = add(made, "tbody");
  for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) {
    const row = add(body, "tr");
    for (const cell of cells(lines[at])) inline(cell, add(row, "td"));
  }
  return at;
}

function paragraph(lines, at, parent) {
  const inner = [];
  while (at < lines.length && lines[at].trim() && !FENCE.test(lines[at]) && !/^(#{1,6} | {0,3}>)/.test(lines[at]) && !(inner.length && isItem(lines[at]))) inner.push(lines[at++]);
  inline(inner.join("\n"), add(parent, "p"));
  return at;
}

const INLINE = /(`+)([\s\S]+?)\1(?!`)|\*\*([^\s*](?:[\s\S]*?[^\s*])?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*|(?<!\w)_([^\s_](?:[^_]*[^\s_])?)_(?!\w)|~~([\s\S]+?)~~|\[([^\]\n]+)\]\(([^()\s]+)\)/;

function inline(text, parent) {
  let rest = text;
  for (let found = INLINE.exec(rest); found; found = INLINE.exec(rest)) {
    if (found.index) parent.append(rest.slice(0, found.index));
    const [, tick, inCode, strong, emphasis, other, struck, label, address] = found;
    if (tick) add(parent, "code").textContent = inCode;
    else if (strong) inline(strong, add(parent, "strong"));
    else if (emphasis || other) inline(emphasis || other, add(parent, "em"));
    else if (struck) inline(struck, add(parent, "del"));
    else if (/^https?:\/\//.test(address)) {
      const link = add(parent, "a");
      link.href = address;
      link.rel = "noopener noreferrer";
      link.target = "_blank";
      inline(label, link);
    } else parent.append(found[0]);
    rest = rest.slice(found.index + found[0].length);
  }
  if (rest) parent.append(rest);
}

function add(parent, tag, name) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  parent.append(made);
  return made;
}
