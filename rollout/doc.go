// Package rollout holds what workers send and steps consume: rollouts, batches,
// groups, and their packing into micro-batches that hold each prompt once.
//
// It imports nothing but the standard library and internal/fault. Arrow lives in rollout/arrowio,
// durability in rollout/spool; rewards are composed here, advantages are not
// (package sagrpo).
//
// Read rollout.go, then group.go and assembler.go (rows become groups), then pack.go.
package rollout
