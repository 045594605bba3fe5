// Package sagrpo is the algorithm: group-relative advantages, the objectives of
// the GRPO family, their metrics, learning-rate schedules and the step that
// composes them over a model.
//
// It turns complete groups into micro-batches, losses and one optimizer step.
// It knows nothing of jobs, HTTP or files. Read settings.go, then rule.go and
// objective.go (the mathematics), then engine.go (the step).
//
// # The default objective
//
// SA-GRPO ("Advancing LLM-Based Security Automation with Customized Group
// Relative Policy Optimization for Zero-Touch Networks", arXiv 2512.09485), for
// Q questions with G completions each:
//
//	A_i = R_i - mean_j R_j                                        (eq. 17)
//	g   = exp(logp_new - logp_old), per token                     (eq. 16)
//	J   = mean_q (1/G) sum_i sum_t min(g·A_i, clip(g, 1-eps_low, 1+eps_high)·A_i)   (eq. 14, 15)
//
// and the loss is -J: no division of A by the standard deviation, no 1/length,
// no KL term unless beta asks for one. The other objectives are rows of the table
// in rule.go (bnpo is another name of dapo). Each is held to an independent
// float64 reference in the tests, and all that TRL has to TRL's own loss, made
// into goldens by testdata/trl_goldens.py.
//
// # What the paper leaves open, and our choices
//
//   - The mean over questions is over those of the optimizer step. G is the number
//     of rollouts that the group really has: it counts masked and truncated ones,
//     which also count in the group's mean. So do Q and B, the sequences of a step.
//   - A masked token adds nothing to a sum and nothing to a count of tokens
//     (grpo, gspo: the active tokens of the sequence; dapo, cispo: of the step). A
//     sequence without active tokens adds 0 and still counts in B and G.
//   - All denominators are those of the whole step, fixed before it is cut into
//     micro-batches. KL and entropy terms have the weights of the policy term
//     (TRL's entropy term is a mean over tokens whatever the objective).
//   - In a group without variance (greatest reward = least) advantages are exactly
//     0. It stays in the denominators and is not computed at all when beta and
//     entropy_coef are 0. A step of such groups runs the optimizer with a zero
//     gradient: moments decay, weight decay applies, the step counts.
//   - A tie of the clipped and unclipped branch counts as unclipped.
//   - delta bounds the ratio from above where A < 0 and clips the gradient there;
//     for gspo it bounds the sequence's ratio.
//
// # The old policy
//
// Which policy is old is decided per rollout: with old_logprobs unset, one with
// the sampler's log-probs uses them and one without uses the trainer's own, side
// by side in one step if a step has both. The trainer's old log-probs are those
// of the first of the iterations: that one has ratio exactly 1 and costs no extra
// pass; its values are kept in float32 for the following ones.
//
// Truncated importance sampling weighs the policy term by min(exp(old - sampler),
// tis_cap), a constant. In the first iteration old is what the same forward pass
// yields, so the coefficients are computed between the forward and the backward
// pass of the LM head; no second pass through the model is made. A sequence-level
// objective takes the mean of the factors over the sequence's active tokens.
//
// # The optimizer and the reference
//
// The schedule is a closed form of the step (Settings.LR); a warm-up of W steps
// starts at lr/W, not at 0. The reference is the initial policy; with beta > 0 it
// becomes (1-alpha)*reference + alpha*policy after every 512th step of the job,
// alpha 0.6, unless the job says otherwise.
//
// # Settings
//
// A field that the objective would ignore is refused unless it is 0, the value
// that means its absence: what a job shows with every default filled in can be
// submitted again. group_size 1 is refused where advantages are divided by the
// group's deviation; without that it is legal and has no policy gradient.
//
// # Metrics
//
// Means are float64 sums over the active tokens that were computed, so groups
// skipped for want of signal are not in them, unless stated otherwise. A metric
// without a value (no sampler's log-probs, no token computed, cross_entropy's
// rewards) is absent from its step.
//
//	loss                          the whole loss, KL and entropy terms included
//	reward/mean                   over the step's rollouts
//	reward/std                    mean over groups of the sample standard deviation (n-1) in the group
//	reward/<component>/mean       over the rollouts that have the component, before weighting
//	frac_reward_zero_std          share of groups without variance
//	advantage/mean, min, max      over the step's rollouts
//	ratio/mean, max               of tokens; of sequences for gspo
//	clip_ratio/low_mean           share of ratios under 1-epsilon_low with A < 0
//	clip_ratio/high_mean          share over 1+epsilon_high with A > 0; cispo: over ratio_cap
//	clip_ratio/region_mean        both, and those that delta clamps
//	kl                            k3 to the old policy
//	kl/reference                  k3 to the reference, when there is one
//	entropy                       of the next-token distributions, nats
//	grad_norm                     global, before clipping
//	lr                            of this step
//	completions/mean_length, min_length, max_length   tokens, over the step's rollouts, masked ones included
//	completions/clipped_ratio     share of rollouts that were truncated
//	sampling/logp_difference_mean, _max   |trainer - sampler| at the first iteration
//	sampling/ess                  (sum w)^2 / (n sum w^2) over tokens, w = exp(trainer - sampler): 1 when both agree
//	policy_lag/mean, max          steps done when the groups were consumed, less the rollout's policy_step
//	tokens                        that went forward and backward, a prompt once per micro-batch
//	tokens_per_second, mfu, step_time, memory_peak_bytes   see IsTiming; mfu counts useful arithmetic only
package sagrpo
