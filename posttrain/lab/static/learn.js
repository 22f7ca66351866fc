// The course's first page: its chapters, what each needs, how long it is, and what the three layers are.

import { Loaded, grouped, html, printable, useData, useTitle } from "./ui.js";
import { LAYERS, Nodes } from "./course.js";

export function Page() {
  useTitle("Learn");
  const course = useData("/api/course");
  return html`<h1>Reinforcement learning for language models</h1>
    <p class="lead">A course in six chapters. Its formulas are worked with numbers that this library computes while you read, and its code is the code that trains.</p>
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
      <p>Every section says the same thing three times, and you choose how: in words, in mathematics, or in code. Switch at the top of a chapter at any time; your place stays where it is.</p>
      <dl class="layers">${LAYERS.map(([key, name, about]) => html`<dt>${name}</dt><dd>${about}${key !== "all" && html` <span class="soft">${grouped(total(key))} words in all chapters.</span>`}</dd>`)}</dl>
    </section>
    <section><h2>What you need</h2>
      <p>For the intuition: nothing but curiosity. For the mathematics: probabilities, logarithms, expectations and the derivative of a function of several variables. For the implementation: Python, and tensors as in NumPy or PyTorch. Nothing about transformers is assumed beyond this: a language model takes text and returns a probability for every next token.</p>
      <p>Chapters build on each other, but each names what it takes from the earlier ones. <a href="/explore">The five explorers</a> can be opened at any time.</p>
    </section>`;
}
