// What is known of each activation besides its formula: what it costs and what it buys, as far as that was measured.

import * as api from "./api.js";

/** By name: {ns, kernel, quality, variants}. A study of another formula of that name says nothing of this one. */
export async function known(activations) {
  const [{ data: models }, { data: studies }] = await Promise.all([api.models(), api.studies()]);
  const there = new Set(studies.map(({ claim }) => claim.name));
  const read = async (name) => (there.has(name) ? (await api.study(name)).data : {});
  const [cost, language] = await Promise.all(["cost", "language"].map(read));
  return new Map(activations.map(({ name, record_digest: digest }) => {
    const same = ({ digests }) => !digest || !digests?.[name] || digests[name] === digest;
    const of = (study, found = {}) => (same(study) ? found[name] : undefined);
    const alone = of(cost, cost.ns)?.alone ?? {};
    const kernel = ["fused", "unfused"].find((kind) => alone[kind] != null);
    return [name, {
      ns: alone[kernel] ?? null, kernel, others: alone,
      quality: of(language, language.bits_per_byte) ?? null,
      variants: models.filter(({ activation }) => activation === name),
    }];
  }));
}

/** Bits per byte to order by: the study's, which trained all alike; else the best of those served. */
export function bits({ quality, variants }) {
  if (quality?.mean != null) return quality.mean;
  const served = variants.flatMap(({ quality }) => quality?.bits_per_byte ?? []);
  return served.length ? Math.min(...served) : null;
}
