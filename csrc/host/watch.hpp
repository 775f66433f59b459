// Sees within milliseconds that a peer has died, and shows the peers that this process lives.
#pragma once

#include <memory>
#include <thread>
#include <vector>

#include "host/control.hpp"
#include "host/process.hpp"

namespace pipex {

/// One thread that never takes Python's lock, so that no long call of user code can silence it.
class Watch {
 public:
  Watch(std::shared_ptr<Control> control, int rank);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

 private:
  struct Peer {
    int rank;
    Descriptor pidfd;
    bool known = false;  // it has joined and we watch it
    bool gone = false;   // nothing more to see: dead or left
  };

  void run();
  void meet(Peer& peer);
  void check(Peer& peer, bool died);

  const std::shared_ptr<Control> control_;
  const int rank_;
  const int generation_;  // a forked child has this object but not the thread
  std::vector<Peer> peers_;
  Descriptor stop_;  // eventfd
  std::thread thread_;
};

}  // namespace pipex
