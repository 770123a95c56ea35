// csrc/core/blocks.h against the plain meaning of what it says, position by position.
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/blocks.h"

namespace dfq {
namespace {

using Slot = std::pair<int64_t, int64_t>;  // block, slot

class Check {
 public:
  explicit Check(const Blocks& blocks) : blocks_(blocks) {}

  std::string run() {
    for (int64_t block = 0; block < blocks_.count() && error_.empty(); ++block) {
      visit(block);
    }
    const int64_t numel = blocks_.size * blocks_.pieces;
    expect(static_cast<int64_t>(visited_.size()) == numel, "not every position is visited");
    for (int64_t channel = 0; channel < blocks_.channels && error_.empty(); ++channel) {
      gather(channel);
    }
    expect(taken_ == slots_.size(), "not every slot belongs to a channel");
    return error_;
  }

 private:
  void expect(bool holds, const char* what) {
    if (!holds && error_.empty()) {
      error_ = what;
    }
  }

  // The elements of a block's threads, in slots.
  void visit(int64_t block) {
    const Place at = blocks_.place(block);
    const int64_t slots = blocks_.slots(at);
    expect(slots <= blocks_.most_slots(), "more slots than there is room for");
    std::map<int64_t, int64_t> first;
    for (int step = 0; step < at.steps; ++step) {
      for (int64_t i = 0; i < blocks_.block_width(); ++i) {
        const int64_t column = at.column + i;
        const int64_t position = at.begin + step * blocks_.width + column;
        if (column >= blocks_.width || position >= blocks_.size) {
          continue;
        }
        const int64_t in_tensor = at.piece * blocks_.size + position;
        expect(visited_.insert(in_tensor).second, "a position is visited twice");
        const int64_t channel = in_tensor / blocks_.run % blocks_.channels;
        expect(blocks_.channel(at, column / blocks_.run) == channel, "a column changes channel");
        const int64_t slot = blocks_.slot(at, column / blocks_.run);
        expect(slot >= 0 && slot < slots, "a slot is not there");
        Found& found = slots_[{block, slot}];
        expect(found.elements == 0 || found.channel == channel, "a slot has two channels");
        found = {channel, found.elements + 1};
        first.emplace(slot, position);
      }
    }
    for (const auto& [slot, position] : first) {
      expect(blocks_.first(at, slot) == position, "a slot's first position is another");
    }
  }

  // The slots of a channel's entries: all that are its own, each once, with their elements.
  void gather(int64_t channel) {
    int64_t elements = 0;
    for (int64_t i = 0; i < blocks_.entries(); ++i) {
      const Blocks::Entry entry = blocks_.entry(channel, i);
      expect(i > 0 || entry.block >= 0, "the first entry is of no block");
      if (entry.block < 0) {
        continue;
      }
      const Place at = blocks_.place(entry.block);
      expect(entry.slot >= 0 && entry.slot < blocks_.slots(at), "an entry's slot is not there");
      const int64_t n = blocks_.elements(at, entry.slot);
      const auto found = slots_.find({entry.block, entry.slot});
      if (found == slots_.end()) {
        expect(n == 0, "an empty slot has elements");
        continue;
      }
      expect(found->second.channel == channel, "an entry is of another channel");
      expect(found->second.elements == n, "a slot has other elements");
      elements += n;
      ++taken_;
    }
    const int64_t numel = blocks_.size * blocks_.pieces;
    expect(elements == numel / blocks_.channels, "a channel has other elements");
  }

  struct Found {
    int64_t channel, elements;
  };
  const Blocks& blocks_;
  std::set<int64_t> visited_;
  std::map<Slot, Found> slots_;
  size_t taken_ = 0;
  std::string error_;
};

}  // namespace
}  // namespace dfq

// What is wrong with the blocks of a shape, or an empty string; valid until the next call. `out`
// gets what tells one way of cutting from another: pieces, columns, splits, steps.
extern "C" __attribute__((visibility("default"))) const char* check_blocks(int64_t periods,
                                                                           int64_t channels,
                                                                           int64_t run, int lanes,
                                                                           int64_t* out) {
  static std::string error;
  const dfq::Blocks blocks = dfq::cut(periods, channels, run, lanes);
  error = dfq::Check(blocks).run();
  out[0] = blocks.pieces;
  out[1] = blocks.columns;
  out[2] = blocks.splits;
  out[3] = blocks.steps;
  return error.c_str();
}
