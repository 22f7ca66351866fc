// The course's contents page: its chapters, their length, the three layers, and what a reader needs to know.

import { Loaded, grouped, html, printable, useData, useTitle } from "./ui.js";
import { LAYERS, Nodes } from "./course.js";

export function Page() {
  useTitle("Learn");
  const course = useData("/api/course");
  return html`<h1>Reinforcement learning for language models</h1>
    <p class="lead">A course in six chapters. The numbers in its worked examples are computed by this library as you read, and the code it shows is the code that trains.</p>
    <${Loaded} from=${course} of="the course">${(chapters) => html`<${Contents} chapters=${chapters} />`}</${Loaded}>`;
}

function Contents({ chapters }) {
  const total = (layer) => chapters.reduce((sum, one) => sum + one.words[layer], 0);
  return html`
    <ol class="chapters">${chapters.map((one, i) => html`<li class="box">
      <h2><a href=${`/learn/${one.name}`}><span class="soft">${i + 1}</span> ${printable(one.title)}</a></h2>
      <${Nodes} of=${one.lead} />
      <details><summary>${one.sections.length} sections, ${grouped(one.words.intuition)} words in the first layer</summary>
        <ul>${one.sections.map((section) => html`<li><a href=${`/learn/${one.name}#${section.id}`}>${printable(section.title)}</a></li>`)}</ul></details>
    </li>`)}</ol>
    <section><h2>Three layers</h2>
      <p>Every section explains the same thing in three ways: in words, in mathematics and in code. You can switch at the top of a chapter at any time without losing your place.</p>
      <dl class="layers">${LAYERS.map(([key, name, about]) => html`<dt>${name}</dt><dd>${about}${key !== "all" && html` <span class="soft">${grouped(total(key))} words in all chapters.</span>`}</dd>`)}</dl>
    </section>
    <section><h2>What you need</h2>
      <p>For the intuition: nothing but curiosity. For the mathematics: probabilities, logarithms, expectations and derivatives of functions of several variables. For the implementation: Python, and tensors as in NumPy or PyTorch. All you need to know about transformers is that a language model takes text and returns a probability for every possible next token.</p>
      <p>Chapters build on each other, but each says what it uses from the earlier ones. You can open <a href="/explore">the six explorers</a> at any time.</p>
    </section>`;
}
